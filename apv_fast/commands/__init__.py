"""One file a command of ``apv-fast``; :mod:`apv_fast.cli` reads the command line and calls them."""
