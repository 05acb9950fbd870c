"""The parts that recipes share."""
