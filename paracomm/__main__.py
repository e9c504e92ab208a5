"""`python -m paracomm` is the `paracomm` command."""

from paracomm.cli.main import main

if __name__ == "__main__":
    main()
