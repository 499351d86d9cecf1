"""Accuracy against KV budget: suites of questions, methods of sparse attention, one harness that scores them all."""
