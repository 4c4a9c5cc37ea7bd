"""What a calibration folder or artifact looks like on disk: read and checked without torch."""
