--- The life of a worker: its timers, and its end.
--
-- A worker that leaves (`nginx -s reload`, `quit`) takes no new timers but those without a delay, and lives until its last
-- one has ended. moonrabbit.resty.keeper is what keeps connections until then.
-- @module moonrabbit.resty.life

local runtime = require "moonrabbit.runtime.resty"

---@class moonrabbit.resty.Life
---@field exiting boolean  the worker is to leave
local life = { exiting = false }

local exiting = ngx.worker.exiting

-- A timer of nginx's own. Kong has put a wheel in the place of ngx.timer.at, whose jobs share a few timers, and has kept
-- the original under this name. In the last phase of a worker ngx_lua throws instead of saying that it is too late.
local function timer_at(...)
  if ngx.get_phase() == "exit_worker" then return nil, "process exiting" end
  return (_G.native_timer_at or ngx.timer.at)(...)
end
life.timer_at = timer_at

--- Seconds: a timer that has not begun so long after it was due never will, for nginx has too many.
life.LATE = 1

-- A timer that is aborted when the worker leaves tells of it.
local SENTINEL = 3600

local listeners = {}
local armed = false

local function leave()
  if life.exiting then return end
  life.exiting = true
  for _, fn in ipairs(listeners) do -- what one throws keeps the others from nothing
    local ok, err = xpcall(fn, debug.traceback)
    if not ok then runtime.log("error", "a worker leaves: " .. tostring(err)) end
  end
  -- What a timer posts that is aborted arrives with nginx's next event: this is one.
  timer_at(0, function() end)
end

-- One that nginx does not run, for too many others run, is there again the next time.
local function arm()
  local ok, err = (_G.native_timer_every or ngx.timer.every)(SENTINEL, function(premature)
    if premature then leave() end
  end)
  if not ok then ngx.log(ngx.ERR, "moonrabbit: no timer to notice the worker's end with: ", err) end
end

--- Notices that the worker is to leave, should the timer that does so not have been run. Sessions look about as often as
--- their heartbeats are.
function life.look()
  if exiting() then leave() end
end
runtime.look = life.look

--- Calls `fn` once the worker is to leave. It must not yield.
function life.on_exit(fn)
  listeners[#listeners + 1] = fn
  if not armed then
    armed = true
    arm()
  end
end

return life
