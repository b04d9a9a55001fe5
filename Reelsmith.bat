@echo off
rem Double-click this: it sets up what is missing, then opens the page. It needs no Python: it downloads uv, and uv
rem downloads one. A zip file of a newer version that is dropped on it is unpacked beside this folder. docs/install.md
set "REELSMITH_STARTED_IN=%CD%"
cd /d "%~dp0"
if exist .venv\Scripts\python.exe if not exist .reelsmith\build.txt .venv\Scripts\python.exe set_up.py %* & pause & exit /b
if "%PROCESSOR_ARCHITECTURE%%PROCESSOR_ARCHITEW6432%"=="x86" echo PyTorch is not made for Windows of 32 bit, so Reelsmith cannot run here.& pause & exit /b 1

set VERSION=0.11.28
set SUM=0a23463216d09c6a72ff80ef5dc5a795f07dc1575cb84d24596c2f124a441b7b
set PART=.reelsmith\uv-%VERSION%.part
set TOOLS=%SystemRoot%\System32
set "UV_CACHE_DIR=%CD%\.reelsmith\cache"
set "UV_PYTHON_INSTALL_DIR=%CD%\.reelsmith\python"
rem what was downloaded is deleted last: while it is there, uv may have been unpacked by half
if exist .reelsmith\uv.exe if not exist %PART% goto run
rem the mistakes that need no Python, before anything is downloaded
set "WORD=%~1"
set "BUILD=%~2"
if not defined WORD goto download
if /i "%WORD%"=="update" goto download
if /i "%WORD:~-4%"==".zip" goto download
if "%WORD%"=="--build" goto build
if "%WORD:~0,1%"=="-" goto download
echo "%WORD%" is unknown. Type update, update NEW.zip, or nothing to start.& pause & exit /b 2
:build
for %%b in (cu130 cu126 rocm cpu mac) do if "%BUILD%"=="%%b" goto download
echo --build: there is no such build of torch. Type one of cu130, cu126, rocm, cpu, mac.& pause & exit /b 2

:download
echo Downloading uv %VERSION% (about 25 MB) and with it Python 3.12 (about 30 MB) from github.com into "%CD%\.reelsmith"
if not exist .reelsmith mkdir .reelsmith
call :is_whole && goto unpack
set GET="%TOOLS%\curl.exe" --fail --location --retry 3 --continue-at - --output %PART% https://github.com/astral-sh/uv/releases/download/%VERSION%/uv-x86_64-pc-windows-msvc.zip
%GET%
rem some servers and proxies know no beginning in the middle of a file
for %%c in (33 36) do if %errorlevel%==%%c goto anew
goto arrived
:anew
if exist %PART% del %PART%
%GET%
:arrived
if errorlevel 1 echo uv could not be downloaded. Check the connection and the room on the disk; the next start goes on.& pause & exit /b 1
call :is_whole && goto unpack
del %PART%
echo What was downloaded is not uv %VERSION%, so it was deleted and not run. Start again.& pause & exit /b 1

:unpack
if exist .reelsmith\unpacked rmdir /s /q .reelsmith\unpacked
mkdir .reelsmith\unpacked
"%TOOLS%\tar.exe" -xf %PART% -C .reelsmith\unpacked
if errorlevel 1 echo uv could not be unpacked. Free some space on the disk and start again.& pause & exit /b 1
move /y .reelsmith\unpacked\*.exe .reelsmith >nul
if errorlevel 1 echo uv could not be put into its place. Close what uses "%CD%\.reelsmith" and start again.& pause & exit /b 1
rmdir /s /q .reelsmith\unpacked
del %PART%
:run
.reelsmith\uv.exe python find --system --managed-python 3.12 >nul 2>&1 || .reelsmith\uv.exe python install --no-bin --no-registry 3.12
if errorlevel 1 echo Python 3.12 could not be downloaded. Check the connection and the room on the disk, and start again.& pause & exit /b 1
.reelsmith\uv.exe run --quiet --no-project --managed-python --python 3.12 set_up.py %* & pause & exit /b

:is_whole
if not exist %PART% exit /b 1
"%TOOLS%\certutil.exe" -hashfile %PART% SHA256 | "%TOOLS%\findstr.exe" /i /c:"%SUM%" >nul
exit /b %errorlevel%
