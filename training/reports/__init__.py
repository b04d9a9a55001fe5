"""What a run reports: logs, numbers, slow steps.

drawing: draw the page in a separate process
history: keep all reports of a run as lines of a file
item_losses: compare losses of single images, for the page
logs: progress bar, and the recorded values of steps
page: one HTML page about a training
present_files: make a run's commands name existing files
pauses: time steps and what interrupts them; slow steps
reporter: pass a run's events to history and page
sample_files: find a run's samples, draw sheets, fill the page's grid
scores: scores of samples; the best file of a run
sections: further sections of a run's page
metric_charts: how the page shows additional metrics of steps
"""
