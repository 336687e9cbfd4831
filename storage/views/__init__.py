"""What people look at: a part, a run, its report and pictures. All of it is read from a run's files alone."""
