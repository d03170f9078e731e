"""Token selectors: the interface, selectors of a stage inside the decoder, and selectors before the decoder."""
