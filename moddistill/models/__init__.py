"""Architectures as pure Linen modules.

Shape letters, the same in every signature, einsum and comment of this package and of `losses`:

    B batch        T positions (queries)   S positions (keys)   D width        F feed-forward width
    N query heads  K key/value heads       H head width         V vocabulary   E experts
    C slots of an expert, or positions of a chunk               P patches      I images of a sample
    M rows of a dispatch buffer            R repeats of a scanned segment
"""
