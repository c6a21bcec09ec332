--- The runtime for Copas: tasks are threads of Copas, beside the user's own, timers and servers.
--
-- Copas waits by LuaSocket's select(2): for each descriptor that is waited for, it is given an object that looks
-- like a socket (copas/selected.lua). So none may be over 1023, and a turn costs as much as there are such waits.
--
-- Copas 2 and later have a clock (sleep, wakeup). Copas 1 (Debian's lua-copas) has none: there every
-- wait is such an object, and an alarm (a descriptor) ends the select when the next deadline has come.
--
-- Names are looked up by the system (getaddrinfo, in threads of ours): Copas would block.

local net = require "moonrabbit.net"
local hosted = require "moonrabbit.runtime.shared.hosted"
local copas = hosted.library "copas"
local selected = require "moonrabbit.runtime.copas.selected"

local now, new_object, select_for = net.now, selected.new, selected.wait
local pause, pause_forever, wakeup = copas.pause, copas.pauseforever, copas.wakeup

local starts_at_once = not pause_forever -- before 4.0
if copas.sleep and starts_at_once then
  pause = copas.sleep
  pause_forever = function() copas.sleep(-1) end
end
local has_clock = pause_forever ~= nil

local host = {
  name = "copas",
  outside = "it must be made in a thread of Copas: in a function given to copas.addthread, a timer or a "
    .. "server's handler, while copas.loop runs",
  home = function() return hosted.coroutine() and true end,
}

-- What select(2) takes. With one more Copas would throw, in each turn, and end the loop of its user.
local MOST = 1023

function host.refuse(fd)
  if fd <= MOST then return nil end
  return ("no room for descriptor %d: Copas waits by select(2), which takes none over %d"):format(fd, MOST)
end

-- ---- Copas 1 ----------------------------------------------------------------------------------------------------------------

local alarm, alarm_at, never
local OFF = 1e9

local function new_alarm()
  local made, text = net.alarm()
  if not made then error("this system needs Copas 2 or later, which has a clock: " .. text, 0) end
  text = host.refuse(made:fd())
  if text then error(text, 0) end
  return made
end

-- The alarm's thread: whoever still waits arms it anew, before the next select.
local function watch_alarm()
  local object = new_object(alarm:fd())
  while true do
    select_for(object, "r")
    alarm_at = nil
    alarm:set(OFF)
  end
end

function selected.arm(deadline)
  if alarm_at and alarm_at <= deadline then return end
  alarm_at = deadline
  alarm:set(deadline - now())
end

local function pause_without_clock(task, seconds, watch, events)
  if not alarm then
    alarm, never = new_alarm(), new_alarm()
    copas.addthread(watch_alarm)
  end
  local object = watch and watch.object
  if not object then
    object = new_object(watch and watch.fd or never:fd())
    if watch then watch.object = object end
  end
  task.side = object[events or "r"]
  local ready = select_for(object, events or "r", seconds and now() + seconds)
  task.side = nil
  return ready and watch ~= nil
end

-- ---- Copas 2 and later ------------------------------------------------------------------------------------------------------

--- A thread that wakes a waiting side in time; woken itself, it ends before.
local function limit(side, seconds)
  local limiter = {}
  side.limiter = limiter
  limiter.thread = copas.addthread(function()
    if side.limiter == limiter then pause(seconds) end
    if side.limiter == limiter then side.woken = true end
  end)
  return limiter
end

local function pause_with_clock(task, seconds, watch, events)
  if not watch then
    if seconds then pause(seconds) else pause_forever() end
    return false
  end
  local object = watch.object or new_object(watch.fd)
  watch.object = object
  local side = object[events]
  local limiter = seconds and limit(side, seconds)
  task.side = side
  local ready = select_for(object, events)
  task.side = nil
  if limiter then
    side.limiter = nil
    wakeup(limiter.thread)
  end
  return ready
end

-- ---- The host ---------------------------------------------------------------------------------------------------------------

host.pause = has_clock and pause_with_clock or pause_without_clock

function host.wake(task)
  if task.side then
    task.side.woken = true
  elseif has_clock and task.co then
    wakeup(task.co)
  end
end

function host.start(fn)
  copas.addthread(function()
    if not has_clock then pause_without_clock({}, 0) elseif starts_at_once then pause(0) end
    fn()
  end)
end

---@class moonrabbit.runtime.copas
local M = hosted.runtime(host)

return M
