"""From one command on a login node to a finished run: the job script, its checks, and the supervisor inside the job.

Not the training itself, and no torch: a login node answers at once. `cluster` is what a site is like, `script` what is
submitted, `supervise` what runs in the job and `decide` what it does when something ended.
"""
