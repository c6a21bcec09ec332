--- Says in the log that the event loop stood still for so long that heartbeats are in danger, and where, if the
-- runtime knows.
-- @module moonrabbit.session.turns

local min, huge = math.min, math.huge

local turns = {}

-- What a log is told; `source` may be missing.
local function words(seconds, source)
  return ("the event loop stood still for %.1f s: heartbeats need a turn every few seconds%s"):format(seconds,
    source and " (" .. tostring(source) .. ")" or "")
end

-- Runtimes that time the turns of their tasks, and the sessions with heartbeats that want to hear of long ones.
local watchers = setmetatable({}, { __mode = "k" })

local function shortest(sessions)
  local limit
  for session in pairs(sessions) do limit = min(limit or huge, session.heartbeat / 4) end
  return limit
end

local function new_watcher(runtime)
  local sessions = setmetatable({}, { __mode = "k" })
  local watcher = { sessions = sessions }
  function watcher.report(seconds, source)
    for session in pairs(sessions) do
      if seconds > session.heartbeat / 4 then
        session.turn_reported = runtime.now()
        runtime.spawn(session.log, "warn", words(seconds, source))
      end
    end
  end
  return watcher
end

--- A session with heartbeats wants to hear of long turns, where its runtime times them.
---@param session moonrabbit.Session
function turns.watch(session)
  local runtime = session.runtime
  if not runtime.turn_source then return end
  local watcher = watchers[runtime] or new_watcher(runtime)
  watchers[runtime] = watcher
  if runtime.on_long_turn and runtime.on_long_turn ~= watcher.report then return end -- the user's own
  watcher.sessions[session] = true
  runtime.on_long_turn = watcher.report
  runtime.long_turn = shortest(watcher.sessions)
end

--- It has ended.
---@param session moonrabbit.Session
function turns.unwatch(session)
  local runtime = session.runtime
  local watcher = watchers[runtime]
  if not watcher or not watcher.sessions[session] then return end
  watcher.sessions[session] = nil
  if runtime.on_long_turn == watcher.report then
    runtime.long_turn = shortest(watcher.sessions)
    if not runtime.long_turn then runtime.on_long_turn = nil end
  end
end

--- A task of the session woke `by` seconds late: what the loop stood still for is told, unless it was already.
---@param session moonrabbit.Session
---@param by number
function turns.late(session, by)
  local runtime, interval = session.runtime, session.heartbeat
  local reported = session.turn_reported and runtime.now() - session.turn_reported < by + 1
  if interval > 0 and by > interval / 4 and not reported then
    session.log("warn", words(by, runtime.turn_source and runtime.turn_source()))
  end
end

return turns
