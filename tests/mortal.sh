#!/bin/sh
# Stands in for the Python that a flow starts its programs with: `-m MODULE ARGUMENTS`.
exec "${MORTAL_PYTHON:?}" "$(dirname "$0")/mortal.py" "$@"
