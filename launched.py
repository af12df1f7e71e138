"""End with the launcher, from the first moment: imports take seconds. Import this before torch."""

from stopping import end_with_launcher

end_with_launcher()
