"""`python -m tools.convert_weights`: the command line of the converter in a checkout.

The same as `python -m moddistill.convert_weights`, which an installed wheel has.
"""

from moddistill.convert_weights import main

if __name__ == "__main__":
    main()
