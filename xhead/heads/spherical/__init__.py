"""The factored spherical output layer: exact SGD steps whose cost does not depend on the number of classes.

head -> rows, gradient, attachment -> conditioning -> step -> factored
"""
