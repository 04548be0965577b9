"""The case registry and the benchmark built on it.

``cases`` says what is measured, ``build`` makes inputs and layers for it, ``gate`` decides whether
the results are right, ``runner`` times what passed, ``report`` and ``plot`` show it.
"""
