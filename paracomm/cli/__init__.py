"""The command line: `paracomm` or `python -m paracomm`."""
