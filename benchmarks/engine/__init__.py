"""The engine by itself: gaps between its passes, its memory, and what an idle model costs."""
