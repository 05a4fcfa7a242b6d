"""The converter's command line in a checkout: `python -m tools.convert_weights`.

It is `moddistill.convert_weights`, which an installed wheel has as `moddistill-convert`.
"""

from moddistill.convert_weights import main

if __name__ == "__main__":
    main()
