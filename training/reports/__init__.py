"""What a run reports: logs, numbers, slow steps.

drawing: draw the page in a process apart
history: keep all reports of a run in lines
item_losses: losses of single images, compared, for the page
logs: progress bar, and what is recorded of steps
page: one HTML page about a training
present_files: let commands of a run name files that exist
pauses: time steps and what interrupts them; slow steps
reporter: pass a run's events to history and page
sample_files: find a run's samples, draw sheets, fill the page's grid
scores: scores of samples; the best file of a run
sections: further parts of a run's page
metric_charts: how the page shows additional metrics of steps
"""
