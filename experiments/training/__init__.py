"""The parts of the training program around its loop."""
