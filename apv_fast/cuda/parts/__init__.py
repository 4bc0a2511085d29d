"""What both scans share: the library, and the recurrence on it."""
