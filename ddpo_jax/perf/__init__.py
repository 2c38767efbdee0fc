"""Speed and memory: benchmark, and what a run takes by a compiler or on paper."""
