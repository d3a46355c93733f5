"""Run the ranks as processes: start, agree, stop, hang and fail."""
