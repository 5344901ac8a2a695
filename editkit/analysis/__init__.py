"""Why an edited model breaks: analyses of a finished run, behind `editkit analyse`."""
