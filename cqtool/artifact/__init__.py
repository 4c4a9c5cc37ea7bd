"""The release: a calibration folder with a model card and a manifest, on disk and on the Hub."""
