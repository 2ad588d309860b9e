"""One module for each kind of file that data sets of extreme classification come in."""
