"""The profile's page: complete, safe, without any network, and readable on a phone, in a real browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from trio_edge.profiling import statistics as distribution_module
from trio_edge.profiling.cli import main
from trio_edge.profiling.measure.ceilings import Ceilings
from trio_edge.profiling.measure.layers import LayerTime, OperatorTime
from trio_edge.profiling.measure.machine_info import MachineReport
from trio_edge.profiling.measure.measuring import ProfileConditions
from trio_edge.profiling.measure.sensors import sampling_thread
from trio_edge.profiling.measure.sensors.sampling_thread import SensorRange
from trio_edge.profiling.page.page import page_html
from trio_edge.profiling.report import profile as profile_module
from trio_edge.profiling.report.profile import (
    BundleProfile,
    Comparison,
    DecodeStep,
    GraphProfile,
    Load,
    MemoryProfile,
    ProfileReport,
    SizePoint,
)
from trio_edge.profiling.statistics import distribution, line_fit, median_ratio
from trio_edge.runtime.bundle.errors import install_command

PHONE_WIDTH = 360
LEAST_TEXT = 8.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium; runs where the package chromium is installed"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = "<script>document.title='run'</script>&\"'"


def graph(name: str, phase: str, milliseconds: float, number: int) -> GraphProfile:
    """Return a graph with values that no other has."""
    return GraphProfile(
        name=name,
        role="suffix",
        phase=phase,
        profile="decode" if phase == "decode" else "prefill_2928+64",
        calls_per_answer=15.25,
        call_ms=distribution([milliseconds, milliseconds * 1.0123, milliseconds * 1.3]),
        answer_ms=milliseconds * 15.25,
        share=0.0123 * number,
        flops=1.234e9 * number,
        moved_bytes=5.678e7 * number,
        flops_per_s=3.21e10 + number,
        bytes_per_s=4.32e9 + number,
        intensity=0.51 * number,
        bound="memory",
        of_ceiling=0.717,
        verdict="memory-bound, 72 % of bandwidth",
    )


def bundle_profile(label: str, scale: float) -> BundleProfile:
    """Return a bundle with every optional value there."""
    names = [
        "vision",
        "prefix",
        "select_1",
        "segment_1",
        "select_2",
        "segment_2",
        "select_3",
        "suffix",
        "head",
    ]
    return BundleProfile(
        label=label,
        bundle=f"/data/{label}",
        manifest_sha256="0123abcd",
        model="llava-next-7b",
        dtype="float16",
        formats={"prefix": "int4", "head": "int8", "suffix": "int4"},
        selection="trio keeps 460 at layer 1, 270 at layer 10, 110 at layer 15",
        visual_tokens=2880,
        processed_tokens=319.5 * scale,
        kept_tokens=(460, 270, 110),
        text_tokens=41,
        load=Load(open_ms=12.5 * scale, graphs_ms=3456.7, first_answer_ms=901.2, first_ttft_ms=812.3),
        ttft_ms=distribution([301.1 * scale, 302.2 * scale, 333.3]),
        prefill_ms=distribution([201.1 * scale, 202.2, 203.3]),
        token_ms=distribution([61.1 * scale, 62.2, 63.3]),
        tokens_per_s=16.07 * scale,
        answer_ms=distribution([1301.1 * scale, 1302.2, 1303.3]),
        host_first_ms=distribution([11.1 * scale, 12.2, 13.3]),
        host_token_ms=0.75 * scale,
        graphs=(
            *(graph(name, "prefill", (20 + index) * scale, index + 1) for index, name in enumerate(names)),
            *(graph(name, "decode", (2 + index) * scale, 20 + index) for index, name in enumerate(("prefix", "head"))),
        ),
        decode=tuple(
            DecodeStep(
                context=2921 + 80 * step,
                cached_rows=360.5 + 80 * step,
                ms=distribution([60.5 * scale, 61.5 * scale + 0.1 * step]),
            )
            for step in range(6)
        ),
        decode_fit=line_fit([360.5, 440.5], [[60.5 * scale, 60.7], [61.5 * scale, 61.6]]),
        sizes=tuple(
            SizePoint(
                width=336 * side,
                height=672,
                visual_tokens=576 * side,
                processed_tokens=64.5 * side,
                ttft_ms=distribution([101.5 * side * scale, 104.5 * side]),
            )
            for side in (1, 2, 4)
        ),
        memory=MemoryProfile(
            weights=14_130_000_000,
            kv_allocated=312_345_678,
            kv_used=123_456_789,
            buffers=98_765_432,
            workspace=345_678_901,
            other=456_789_012,
            peak_rss=15_678_901_234,
            loading_rss=14_567_890_123,
            answering_rss=1_234_567,
            device_free=3_210_987_654,
        ),
        energy_j={"module": 41.25 * scale},
        sensors={"temperature_c.gpu": SensorRange(least=41.5, mean=44.25, most=47.125)},
        operators=(OperatorTime(graph="suffix", phase="decode", kind="gemm", layers=7, answer_ms=4.56),),
        layers=(
            LayerTime(
                graph="suffix", phase="decode", name="layers.31", kind="gemm", answer_ms=1.23, calls_per_answer=15.0,
                shapes="Half[1, 4096]",
            ),
        ),
        advice=("export with less --max-new-tokens & <less>",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    """A report of a reduced bundle on a Jetson and one with a name that attacks the page."""
    first, second = bundle_profile("reduced", 1.0), bundle_profile(HOSTILE, 2.5)
    return ProfileReport(
        schema_version=1,
        device=MachineReport(
            name="Jetson AGX Orin",
            machine="aarch64",
            system="Linux 5.15.148-tegra",
            cores=12,
            memory_bytes=65_890_000_000,
            gpu="Orin",
            gpu_compute_capability=87,
            gpu_memory_bytes=65_880_000_000,
            gpu_driver="540.4",
        ),
        versions={"python": "3.10.12", "tensorrt": "10.3.0"},
        conditions=ProfileConditions(
            started="2026-11-21T12:00:00+00:00",
            backend="tensorrt",
            threads=0,
            clock="events of the GPU",
            power_mode="MAXN (0)",
            cpu_governor="schedutil",
            load_average=0.25,
            image="672x672 random pixels",
            prompt="What is in the image?",
            new_tokens=16,
            warm_up=3,
            runs=33,
            stopped="medians known to 2 %",
            sensors=("tegrastats",),
            missing=("CPU energy: no readable counter",),
        ),
        ceilings=Ceilings(flops_per_s=3.87e13, matmul="float16", bytes_per_s=1.73e11, copy="256 MB"),
        bundles=(first, second),
        comparisons=(
            Comparison(
                label=second.label,
                reference=first.label,
                ratios={"ttft_ms": median_ratio([2.0, 2.1, 2.3], [1.0, 1.1, 1.0])},
                sizes={"kv_used": 8.125},
            ),
        ),
    )


@pytest.fixture(scope="module")
def page(report: ProfileReport) -> str:
    return page_html(report).decode()


class _Reader(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def leaves(value: Any) -> list[Any]:
    """Return everything in ``value`` that holds nothing else, and the names of what does."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in (name, *leaves(inner))]
    return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]


def test_every_value_of_the_json_is_on_the_page(report: ProfileReport, page: str) -> None:
    reader = _Reader(page)
    shown = set(" ".join(reader.texts).split())
    text = " ".join(" ".join(reader.texts).split())
    values = [leaf for leaf in leaves(json.loads(msgspec.json.encode(report))) if leaf is not None]
    assert len(values) > 500
    for value in values:
        if isinstance(value, str):
            assert " ".join(value.split()) in text
        else:
            assert msgspec.json.encode(value).decode() in shown


def test_the_docs_name_every_key_of_the_json() -> None:
    text = (Path(__file__).parents[2] / "docs/profile.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`\.?(\w+)(?:\[\])?`", text))
    parts = [
        part
        for module in (profile_module, distribution_module, sampling_thread)
        for part in vars(module).values()
        if isinstance(part, type) and issubclass(part, msgspec.Struct)
    ]
    assert len(parts) > 15
    assert {name for part in parts for name in part.__struct_fields__} <= named


def test_the_page_is_well_formed_and_needs_nothing_else(page: str) -> None:
    reader = _Reader(page)
    assert reader.open == []
    assert {"script", "link", "img", "iframe", "object", "embed"}.isdisjoint(tag for tag, _ in reader.tags)
    names = {name for _, attributes in reader.tags for name in attributes}
    assert names.isdisjoint({"src", "href", "srcset", "data", "action"})
    links = {attributes["xlink:href"] for _, attributes in reader.tags if "xlink:href" in attributes}
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert links <= {f"#{name}" for name in ids}
    assert len(ids) == len(set(ids))
    assert not re.search(r"url\((?!#)|@import|https?:", page)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags


def test_numbers_are_named_by_format(report: ProfileReport, page: str) -> None:
    assert report.bundles[0].numbers == "float16, int4 in prefix, suffix, int8 in head"
    assert "float16, int4 in prefix, suffix, int8 in head;" in page


def test_a_name_cannot_become_markup(page: str) -> None:
    assert HOSTILE not in page
    assert html.escape(HOSTILE).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page


def test_every_plot_is_there_and_its_marks_say_their_values(page: str) -> None:
    reader = _Reader(page)
    titles = [attributes["aria-label"] for tag, attributes in reader.tags if tag == "svg"]
    assert titles == [
        "Time to the first token by graph",
        "Time of a later token by graph",
        "Time of a token over context length",
        "Time to the first token against visual tokens",
        "Memory",
        "Roofline",
    ]
    assert {attributes["role"] for tag, attributes in reader.tags if tag == "svg"} == {"img"}
    texts = set(reader.texts)
    for tip in (
        "vision: 20.2 ms",
        "weights: 14,100 MB",
        "reduced: head, decode: memory-bound, 72 % of bandwidth",
    ):
        assert tip in texts
    assert f"{HOSTILE}: prefix, prefill: memory-bound, 72 % of bandwidth" in texts


def test_the_same_values_give_the_same_page(report: ProfileReport, page: str) -> None:
    assert page_html(report).decode() == page


def test_a_page_without_matplotlib_is_refused_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["BUNDLE", "--html", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"--html: expected matplotlib to be installed, got none; run {install_command('profile')}"
    )


def browse(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the browser with a profile folder of its own."""
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


MEASURE = """<!doctype html><title>measure</title><iframe id="phone" width="{width}" height="800" style="border:0"></iframe>
<pre id="found"></pre><script>
const phone = document.getElementById("phone");
phone.onload = () => {{
  const inner = phone.contentDocument, root = inner.documentElement;
  for (const details of inner.querySelectorAll("details")) details.open = true;
  const plots = [...inner.querySelectorAll("svg")].map(svg => {{
    const frame = svg.getBoundingClientRect();
    return {{
      width: frame.width,
      outside: [...svg.querySelectorAll("text, use")].filter(text => {{
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
      }}).map(text => text.outerHTML),
      text: 12 * frame.width / svg.viewBox.baseVal.width,
    }};
  }});
  const cut = [...inner.querySelectorAll("p, li, figcaption, h1, h2, strong")].filter(
    one => one.getBoundingClientRect().right > {width} + 1).map(one => one.textContent);
  document.getElementById("found").textContent = JSON.stringify(
    {{page: root.scrollWidth, plots, cut, title: inner.title,
      hidden: [...inner.querySelectorAll(".cards td, .graphs td:not(.less)")].filter(
        cell => cell.getBoundingClientRect().right > {width} + 1).map(cell => cell.textContent),
      rows: [...inner.querySelectorAll("tr:not(:has(.soft, .verdict))")].map(row => row.getBoundingClientRect().height)}});
}};
phone.srcdoc = {page};
</script>"""


@needs_browser
def test_a_browser_shows_the_page_on_a_phone_without_scrolling_sideways(page: str, tmp_path: Path) -> None:
    source = json.dumps(page).replace("</", "<\\/").replace("<!--", "<\\!--")
    file = tmp_path / "measure.html"
    file.write_text(MEASURE.format(width=PHONE_WIDTH, page=source), encoding="utf-8")
    shown = browse(tmp_path, "--virtual-time-budget=10000", "--dump-dom", file.as_uri()).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)[1]))
    assert found["title"].startswith("trio-profile: reduced, <script>")
    assert found["page"] <= PHONE_WIDTH
    assert found["cut"] == []
    assert (
        found["hidden"] == []
    )  # of the summary and of what the graphs come to, nothing lies outside of the screen
    assert max(found["rows"]) < 45  # no cell is squeezed into a column of words
    assert len(found["plots"]) == 6
    for plot in found["plots"]:
        assert plot["width"] > PHONE_WIDTH * 0.75
        assert plot["outside"] == []
        assert plot["text"] >= LEAST_TEXT


@needs_browser
@pytest.mark.parametrize(("scheme", "is_dark"), [(0, True), (1, False)], ids=["dark", "light"])
def test_a_browser_paints_the_page_in_the_readers_colours(
    scheme: int, is_dark: bool, page: str, tmp_path: Path
) -> None:
    file, image = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page, encoding="utf-8")
    settings = f"--blink-settings=preferredColorScheme={scheme}"
    browse(tmp_path, settings, "--window-size=1200,1600", f"--screenshot={image}", file.as_uri())
    shown = Image.open(image).convert("RGB")
    assert (sum(shown.getpixel((3, 3))) < 3 * 64) == is_dark
    colours = shown.getcolors(maxcolors=1 << 24)
    bright = [colour for count, colour in colours if count > 100 and max(colour) - min(colour) > 60]
    assert len(bright) >= 8  # the bars of the graphs
