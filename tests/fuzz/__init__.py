"""Fuzzers: hostile bytes against everything that reads a client's bytes.

Why two kinds: the code that parses headers is Python, where coverage shows the way in (``coverage_guided``, atheris);
what unpacks voxels is C (Pillow, imagecodecs, isal, ITK), which coverage does not see and which can take the process
with it, so it is fed mutated files in a child process that may die (``mutate``).

==================  ==================================================================================
``seeds``           files to start from, made in memory by the formats' own writers
``targets``         bytes -> what a request would do with them, and what must be true of the outcome
``guard``           what must hold of the process meanwhile: no file opened, no memory, time or handle lost
``mutations``       bytes -> other bytes, with knowledge of the formats
``traps``           what they must notice, on purpose
``child``           a process that runs targets under guard until it dies
``mutate``          the mutation fuzzer
``coverage_guided`` the coverage-guided fuzzer
``regressions/``    inputs that once were finds
==================  ==================================================================================
"""
