"""The ROS 2 example without ROS: messages, the newest one wins, the node against stand-ins, and the package's files."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import json
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from examples.ros2.trio_edge_ros.latest import BANDS, LatestImage, Outputs, fill, pixels_of
from tests.bundles import export
from tests.runtime.test_watcher import GATE, PICTURES, STAGES, Answers
from trio_edge.runtime import ImageError, Watcher
from trio_edge.runtime.images.reading import open_image

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2] / "examples" / "ros2"
NAME = "trio_edge_ros"


def message_of(rgb: np.ndarray, encoding: str, *, padding: int = 0, as_bytes: bool = True) -> Any:
    """Return a made-up sensor_msgs/Image."""
    height, width, _ = rgb.shape
    alpha = np.full((height, width, 1), 9, np.uint8)
    pixels = {
        "rgb8": rgb,
        "bgr8": rgb[..., ::-1],
        "rgba8": np.concatenate([rgb, alpha], 2),
        "bgra8": np.concatenate([rgb[..., ::-1], alpha], 2),
        "mono8": rgb[..., :1],
    }[encoding]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)), constant_values=200)
    data: Any = rows.tobytes()
    if not as_bytes:
        data = array("B", data)  # what rclpy gives
    stamp = SimpleNamespace(sec=1_000_000_000, nanosec=500_000_000)
    return SimpleNamespace(
        header=SimpleNamespace(stamp=stamp, frame_id="camera"),
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=rows.shape[1],
        data=data,
    )


@pytest.mark.parametrize("as_bytes", [False, True], ids=["array", "bytes"])
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("encoding", BANDS)
def test_a_message_has_the_pixels_of_its_encoding(encoding: str, padding: int, as_bytes: bool) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (11, 17, 3), np.uint8)
    if encoding == "mono8":
        rgb = np.repeat(rgb[..., :1], 3, 2)
    image = open_image(pixels_of(message_of(rgb, encoding, padding=padding, as_bytes=as_bytes)))
    np.testing.assert_array_equal(np.asarray(image), rgb)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "16UC1"}, "expected one of rgb8, bgr8, rgba8, bgra8, mono8, got '16UC1'; convert it"),
        ({"encoding": "yuv422"}, "got 'yuv422'"),
        ({"step": 10}, "expected 4 rows of 10 bytes for 6 pixels, got 72; check the driver"),
        ({"height": 5}, "expected 5 rows of 18 bytes for 6 pixels, got 72"),
        ({"width": 7}, "for 7 pixels, got 72"),
        ({"data": b""}, "got 0; check the driver"),
    ],
)
def test_a_message_that_does_not_fit_is_one_line(change: dict[str, Any], message: str) -> None:
    given = message_of(np.zeros((4, 6, 3), np.uint8), "rgb8")
    vars(given).update(change)
    with pytest.raises(ImageError, match=message):
        pixels_of(given)


def test_a_drawing_is_a_message_that_reads_as_itself() -> None:
    drawing = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 8, 3), np.uint8))
    filled = fill(SimpleNamespace(), drawing, "header")
    assert (filled.header, filled.encoding, filled.step) == ("header", "rgb8", 24)
    np.testing.assert_array_equal(pixels_of(filled), np.asarray(drawing))


class Slow(Answers):
    """A model whose answers wait until they may go on."""

    def __init__(self, *probabilities: Any) -> None:
        super().__init__(*probabilities)
        self.is_asked, self.may_answer = threading.Event(), threading.Event()

    def decide(self, image: Image.Image, questions: Any, level: Any) -> Any:
        self.is_asked.set()
        assert self.may_answer.wait(60)
        return super().decide(image, questions, level)


def outputs(
    lines: list[str], *, drawings: list[Any] | None = None, warnings: list[str] | None = None
) -> Outputs:
    return Outputs(
        decision=lines.append,
        overlay=lambda drawing, header: None if drawings is None else drawings.append((drawing, header)),
        wants_overlay=lambda: drawings is not None,
        warn=(warnings if warnings is not None else []).append,
    )


def a_frame(level: int) -> Any:
    return message_of(np.full((48, 64, 3), level, np.uint8), "bgr8")


def test_the_newest_message_wins() -> None:
    lines: list[str] = []
    model = Slow((0.9, 0.1, 0.0))
    node = LatestImage(Watcher(model, [GATE]), outputs(lines), source="image")  # type: ignore[arg-type]
    node.put(a_frame(0))
    assert model.is_asked.wait(60)
    for number in range(1, 10):  # while the first one is answered
        node.put(a_frame(20 * number))
    model.is_asked.clear()
    model.may_answer.set()
    assert model.is_asked.wait(60)
    node.close()
    found = [json.loads(line) for line in lines]
    assert [line["frame"] for line in found] == [0, 9]
    assert {line["time"] for line in found} == {"2001-09-09T01:46:40.500+00:00"}
    assert {line["source"] for line in found} == {"image"}


class Told(LatestImage):
    """Says when it has dealt with a message."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.is_done = threading.Event()
        super().__init__(*arguments, **settings)

    def _answer(self, number: int, message: Any) -> None:
        try:
            super()._answer(number, message)
        finally:
            self.is_done.set()

    def put_and_wait(self, message: Any) -> None:
        self.is_done.clear()
        self.put(message)
        assert self.is_done.wait(120)


def test_a_wrong_encoding_is_told_once_and_the_next_image_is_answered() -> None:
    lines: list[str] = []
    warnings: list[str] = []
    node = Told(Watcher(Answers((0.9, 0.1, 0.0)), [GATE]), outputs(lines, warnings=warnings), source="x")  # type: ignore[arg-type]
    wrong = message_of(np.zeros((4, 6, 3), np.uint8), "rgb8")
    wrong.encoding = "yuv422"
    for message in (wrong, wrong, wrong, a_frame(3), wrong):
        node.put_and_wait(message)
    node.close()
    assert [warning.partition(";")[2] for warning in warnings] == [
        " convert it"
    ] * 2  # again after a good one
    assert len(lines) == 1


def test_closing_drops_what_waits_and_ends_the_thread() -> None:
    model = Slow((0.9, 0.1, 0.0))
    lines: list[str] = []
    node = LatestImage(Watcher(model, [GATE]), outputs(lines), source="x")  # type: ignore[arg-type]
    node.put(a_frame(0))
    assert model.is_asked.wait(60)
    node.put(a_frame(200))
    threading.Timer(0.1, model.may_answer.set).start()
    node.close()
    assert not node._thread.is_alive()
    assert len(lines) == 1


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for ROS, with what the node calls."""
    seen = SimpleNamespace(published=[], subscribed={}, warnings=[], parameters={}, steps=[], watchers=1)

    class Node:
        def __init__(self, name: str) -> None:
            seen.name = name

        def declare_parameter(self, name: str, default: Any) -> Any:
            return SimpleNamespace(value=seen.parameters.get(name, default))

        def create_publisher(self, kind: type, topic: str, depth: int) -> Any:
            return SimpleNamespace(
                publish=lambda message: seen.published.append((topic, kind, message)),
                get_subscription_count=lambda: seen.watchers,
            )

        def create_subscription(
            self, kind: type, topic: str, callback: Callable[[Any], None], qos: Any
        ) -> None:
            seen.subscribed[topic] = (kind, callback, qos)

        def get_logger(self) -> Any:
            return SimpleNamespace(warning=seen.warnings.append)

        def destroy_node(self) -> None:
            seen.steps.append("destroyed")

    class ExternalShutdownException(Exception):  # noqa: N818 -- rclpy's name
        pass

    def spin(_node: Any) -> None:
        seen.while_spinning()
        raise ExternalShutdownException

    modules = {
        "rclpy": {
            "init": lambda args: seen.steps.append("init"),
            "spin": spin,
            "try_shutdown": lambda: seen.steps.append("shutdown"),
        },
        "rclpy.executors": {"ExternalShutdownException": ExternalShutdownException},
        "rclpy.node": {"Node": Node},
        "rclpy.qos": {
            "QoSProfile": SimpleNamespace,
            "ReliabilityPolicy": SimpleNamespace(BEST_EFFORT="best effort"),
        },
        "sensor_msgs": {},
        "sensor_msgs.msg": {"Image": type("Image", (SimpleNamespace,), {})},
        "std_msgs": {},
        "std_msgs.msg": {"String": type("String", (SimpleNamespace,), {})},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "examples.ros2.trio_edge_ros.node", raising=False)
    return seen


@pytest.mark.parametrize("watchers", [0, 1])
def test_the_node_publishes_decisions_and_an_overlay_that_somebody_wants(
    watchers: int, ros: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = importlib.import_module("examples.ros2.trio_edge_ros.node")
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"name": "star", "kind": "yes-no", "text": "is there a star ?"}]))
    bundle = export("tiny", dtype="float32", schedule=STAGES)
    ros.parameters, ros.watchers = {"bundle": str(bundle), "questions": str(questions), "hold": 1}, watchers
    monkeypatch.setattr(node, "LatestImage", Told)
    sent = message_of(np.asarray(open_image(PICTURES / "shapes-96x96.png")), "bgr8")

    def send() -> None:
        _, callback, qos = ros.subscribed["image"]
        assert (qos.depth, qos.reliability) == (1, "best effort")
        callback.__self__.put_and_wait(sent)

    ros.while_spinning = send
    node.main()
    topics = [topic for topic, _, _ in ros.published]
    assert topics == ["~/decisions"] + ["~/overlay"] * watchers
    line = json.loads(ros.published[0][2].data)
    assert (line["name"], line["answer"], line["frame"]) == ("star", "yes", 0)
    if watchers:
        assert ros.published[1][2].header.frame_id == "camera"
        assert pixels_of(ros.published[1][2]).shape[2] == 3
    assert ros.warnings == []
    assert ros.steps == ["init", "destroyed", "shutdown"]


def test_the_nodes_parameters_are_those_of_the_watcher(ros: SimpleNamespace) -> None:
    parameters = importlib.import_module("examples.ros2.trio_edge_ros.node").PARAMETERS
    known = set(inspect.signature(Watcher.__init__).parameters) - {"self", "pipeline", "questions"}
    assert set(parameters) == known | {"bundle", "questions", "backend"}
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in parameters if f"`{name}`" not in table] == []


def test_package_xml_has_what_ros_asks_for() -> None:
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    assert (package.tag, package.get("format")) == ("package", "3")
    texts = {child.tag: (child.text or "").strip() for child in package}
    assert texts["name"] == NAME
    assert texts["license"] == "Apache-2.0"
    assert all(texts[tag] for tag in ("version", "description", "maintainer"))
    assert "@" in package.find("maintainer").get("email", "")  # type: ignore[union-attr]
    assert package.findtext("export/build_type") == "ament_python"
    needs = {child.text for child in package.findall("exec_depend")}
    imported = {
        (node.module or "").partition(".")[0]
        for node in ast.walk(ast.parse((ROOT / NAME / "node.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert imported - {"__future__", "typing", "trio_edge"} <= needs


def test_setup_files_and_the_index_name_the_package() -> None:
    command = [sys.executable, "setup.py", "--name", "--version", "--license"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    version = ElementTree.parse(ROOT / "package.xml").findtext("version")
    assert result.stdout.split() == [NAME, version, "Apache-2.0"]
    assert (ROOT / "resource" / NAME).read_bytes() == b""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["develop"]["script_dir"] == config["install"]["install_scripts"] == f"$base/lib/{NAME}"
    assert '"console_scripts": [f"watch = {NAME}.node:main"]' in (ROOT / "setup.py").read_text()


def test_the_readme_says_that_it_has_not_run_in_ros() -> None:
    assert "**This has not run in ROS.**" in (ROOT / "README.md").read_text(encoding="utf-8")
