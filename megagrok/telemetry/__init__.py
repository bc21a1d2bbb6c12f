"""What a run says about itself: records of steps and evaluations, and where they go.

`records` is what is measured; `metrics_file`, `tracker`, `progress` and `report` are the four places it goes to.
Nothing here talks to other ranks: values arrive reduced, and one rank writes them.
"""
