"""Package for colcon. trio-edge itself comes from pip, because rosdep does not know it."""

from setuptools import setup

NAME = "trio_edge_ros"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="trio-edge maintainers",
    maintainer_email="maintainers@example.com",
    description="Answers questions about the newest image of a topic, with probabilities, by trio-edge.",
    license="Apache-2.0",
    entry_points={"console_scripts": [f"watch = {NAME}.node:main"]},
)
