"""`python -m sdmp_kernels.timm SCRIPT ARGS...`: run a training script with this package's classes in timm's place."""

from sdmp_kernels.timm.replace import main

if __name__ == "__main__":
    main()
