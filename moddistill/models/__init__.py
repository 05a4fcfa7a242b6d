"""Architectures as pure Linen modules.

Shape letters, the same in every signature, einsum and comment of this package and of `losses`:

    B batch        T positions (queries), of a sample or of all    S positions (keys)
    D width        F feed-forward width    V vocabulary            E experts    k choices of a token
    N query heads  K key/value heads       H head width            M modalities: text, image
    W width of vision features, or of the teacher
    G blocks of rows with one expert each  C rows of a block, or positions of a chunk
    I images of a sample                   U rows of images, each for one row of tokens or several
    P patches of an image                  X patches of all images of a sample
    h, w pixels of an image                Z values of the pixels of a patch
    R repeats of a scanned segment, or layers whose statistics are stacked
"""
