@cd /d "%~dp0"
@.venv\Scripts\python.exe reelsmith.py browser
@pause
