"""The ROS 2 node: an image topic in, decisions (std_msgs/String, JSON) and an overlay image out."""

from __future__ import annotations

from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import String

from trio_edge.runtime import Pipeline, Watcher
from trio_edge.runtime.decisions.question_file import read_questions
from trio_edge.runtime.decisions.watcher import THRESHOLD

from .latest import LatestImage, Outputs, fill

PARAMETERS: dict[str, Any] = {
    "bundle": "",
    "questions": "",
    "backend": "auto",
    "only_changes": True,
    "hold": 1,
    "margin": 0.0,
    "threshold": THRESHOLD,
    "level": "",
}


class WatchNode(Node):  # type: ignore[misc]
    """Subscribes to ``image``; publishes ``~/decisions`` and ``~/overlay``."""

    def __init__(self) -> None:
        super().__init__("trio_watch")
        values = {name: self.declare_parameter(name, default).value for name, default in PARAMETERS.items()}
        questions = read_questions(values.pop("questions"))
        self._pipeline = Pipeline.from_bundle(values.pop("bundle"), backend=values.pop("backend"))
        values["level"] = values["level"] or None  # ROS has no parameter without a value
        self._decisions = self.create_publisher(String, "~/decisions", 10)
        self._overlay = self.create_publisher(Image, "~/overlay", 1)
        outputs = Outputs(
            decision=lambda line: self._decisions.publish(String(data=line)),
            overlay=lambda drawing, header: self._overlay.publish(fill(Image(), drawing, header)),
            wants_overlay=lambda: self._overlay.get_subscription_count() > 0,
            warn=self.get_logger().warning,
        )
        self._latest = LatestImage(Watcher(self._pipeline, questions, **values), outputs, source="image")
        # Of drivers that send faster than the model answers, only the newest frame is of use.
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.create_subscription(Image, "image", self._latest.put, newest)

    def close(self) -> None:
        """End the thread and release the bundle."""
        self._latest.close()
        self._pipeline.close()
        self.destroy_node()


def main(args: list[str] | None = None) -> None:
    """Run the node until it is shut down."""
    rclpy.init(args=args)
    node = WatchNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.close()
        rclpy.try_shutdown()
