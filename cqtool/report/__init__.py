"""Plots and the HTML report, made from the JSON files of a calibration folder."""
