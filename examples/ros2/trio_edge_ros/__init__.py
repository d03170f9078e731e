"""A ROS 2 node around trio-edge's Watcher."""
