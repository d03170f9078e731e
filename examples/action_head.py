"""An action head with random weights on a bundle's hidden states: which array goes where. Its actions mean nothing.

    trio-export tiny --out backbone --outputs hidden
    python examples/action_head.py backbone --image examples/pictures/shapes-96x96.png --prompt "where is the digit 3 ?"

The head has the shape of GR00T's: a chunk of noisy actions and the robot's state attend to each other and, in every second layer,
to the rows of the backbone; the flow that the head returns is followed for a few steps.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np

from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH, HEADS, LAYERS = 128, 4, 4
HORIZON, ACTION_SIZE, STATE_SIZE, STEPS = 16, 7, 14, 4


class ActionHead:
    """Random weights for rows of one width."""

    def __init__(self, backbone_width: int, *, seed: int = 0) -> None:
        random = np.random.default_rng(seed)

        def weight(inputs: int, outputs: int) -> NDArray[np.float32]:
            return random.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)

        self.from_backbone = weight(backbone_width, WIDTH)
        self.from_state, self.from_actions = weight(STATE_SIZE, WIDTH), weight(ACTION_SIZE + 1, WIDTH)
        self.layers = [
            {name: weight(WIDTH, WIDTH) for name in ("query", "key", "value", "out", "mlp")}
            for _ in range(LAYERS)
        ]
        self.to_actions = weight(WIDTH, ACTION_SIZE)

    def actions(
        self, rows: NDArray[np.float32], state: NDArray[np.float32], *, seed: int = 0
    ) -> NDArray[np.float32]:
        """Return a chunk of actions [HORIZON, ACTION_SIZE] for the backbone's rows [R, D] and the robot's state."""
        memory, start = normed(rows @ self.from_backbone), state[None] @ self.from_state
        actions = np.random.default_rng(seed).normal(size=(HORIZON, ACTION_SIZE)).astype(np.float32)
        for step in range(STEPS):
            when = np.full((HORIZON, 1), step / STEPS, np.float32)
            own = np.concatenate([start, np.hstack([actions, when]) @ self.from_actions])
            for number, layer in enumerate(self.layers):
                own = own + attention(normed(own), memory if number % 2 else normed(own), layer)
                own = own + np.maximum(normed(own) @ layer["mlp"], 0)
            actions = actions + own[1:] @ self.to_actions / STEPS
        return actions


def attention(
    queries: NDArray[np.float32], rows: NDArray[np.float32], layer: dict[str, NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return attention of ``queries`` over ``rows``, [Q, WIDTH]."""
    query, key, value = (
        (one @ layer[name]).reshape(len(one), HEADS, -1).transpose(1, 0, 2)
        for one, name in ((queries, "query"), (rows, "key"), (rows, "value"))
    )
    scores = query @ key.transpose(0, 2, 1) * query.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    found = (weights / weights.sum(-1, keepdims=True)) @ value
    result: NDArray[np.float32] = found.transpose(1, 0, 2).reshape(len(queries), WIDTH) @ layer["out"]
    return result


def normed(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows of mean 0 and deviation 1."""
    centred = rows - rows.mean(-1, keepdims=True)
    result: NDArray[np.float32] = centred / (centred.std(-1, keepdims=True) + 1e-5)
    return result


def main() -> None:
    """Print the sizes, the times and the first action."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--image", required=True)
    parser.add_argument("--prompt", required=True)
    options = parser.parse_args()
    with Pipeline.from_bundle(options.bundle) as pipeline:
        start = time.perf_counter()
        found = pipeline.hidden_states(options.image, options.prompt)
        seen = time.perf_counter()
        head = ActionHead(found.values.shape[1])
        actions = head.actions(found.values.astype(np.float32), np.zeros(STATE_SIZE, np.float32))
        done = time.perf_counter()
    print(
        f"backbone: {len(found.values)} rows, {len(found.kept)} of them visual, {1e3 * (seen - start):.1f} ms"
    )
    print(
        f"head with random weights: {HORIZON} actions of {ACTION_SIZE} numbers, {1e3 * (done - seen):.1f} ms"
    )
    print("first action:", " ".join(f"{number:+.2f}" for number in actions[0]))


if __name__ == "__main__":
    main()
