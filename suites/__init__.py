"""The arena: suites that train matched methods on the same data and judge them by lm-eval."""
