--- A connection that is kept while its worker lives.
--
-- Every attempt to connect, and every session, has a timer of its own: nginx frees what a timer has used
-- only when it ends, so one that reconnected for ever would grow for ever.
-- @module moonrabbit.resty.keeper

local Backoff = require "moonrabbit.connection.backoff"
local errors = require "moonrabbit.errors"
local life = require "moonrabbit.resty.life"
local runtime = require "moonrabbit.runtime.resty"
local semaphore = require "ngx.semaphore"
local staying = require "moonrabbit.resty.staying"

local now, timer_at, LATE = runtime.now, life.timer_at, life.LATE
local LONG = require("moonrabbit.runtime.resty.limits").LONG

-- Saying goodbye to the broker may take so long: the worker may be told to leave meanwhile.
local GOODBYE = 1
-- A session that ended before this many seconds counts as an attempt that failed.
local SHORT = 2
-- A number of attempts after which they are as far apart as they come.
local SELDOM = 20
-- Seconds after which the first timer, which nginx may have forgotten, is followed by others.
local MORE_CHANCES = { LATE, 10 * LATE, 60 * LATE, 600 * LATE, 3600 * LATE }

---@class moonrabbit.resty.Keeper
---@field state "idle"|"starting"|"connecting"|"open"|"waiting"
---@field failure moonrabbit.Error?  why the last attempt failed, or the last session ended
---@field sessions integer           how many there have been
---@field attempt integer            how many have failed since one was well
---@field leave_by number?           when the worker must have left
---@field turned table               a condition: the worker is to leave, or what was waited for is over
---@field begun table?               what the timer that is to begin next will post to; none while there is no such timer
---@field started number             when the first timer was started last
---@field backoff table              moonrabbit.connection.backoff
local Keeper = {}
Keeper.__index = Keeper

--- Whether the worker has stayed for this connection as long as it may.
function Keeper:overdue() return life.exiting and now() >= (self.leave_by or 0) end

--- The seconds before the next attempt.
function Keeper:delay()
  self.backoff.attempt = math.max(0, self.attempt - 1)
  return math.min(LONG, (self.backoff:next()))
end

--- What trying again does not help against is tried as seldom as can be.
function Keeper:seldom() self.attempt = math.max(self.attempt, SELDOM) end

-- What still waits when the worker must leave is given up.
local function abandon(self)
  if self:overdue() and self.config.wanted() then self.config.abandon() end
end

-- The seconds that are left for connecting; nil while the worker stays.
local function left_to_connect(self)
  if not life.exiting then return nil end
  return self.config.wanted() and self.leave_by - now() or 0
end

--- Connects, and gives that up when the worker is to leave and has no need of this connection, or no time for it.
---@param connect fun(): moonrabbit.Connection|nil, moonrabbit.Error?
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function Keeper:connect(connect)
  local job = staying.run(self.turned, function() return left_to_connect(self) end, connect)
  if not job.over then
    runtime.cancel(job.task)
    while not job.over do self.turned:wait() end
  end
  if job.whole then return job.result, job.extra end
  if job.result ~= runtime.cancelled then error(job.result, 0) end
  return nil, errors.new { kind = "shutdown", message = "the worker leaves", temporary = true }
end

-- Serves. If that does not end in time, the connection is closed, by which whatever waits on it ends.
local function serve_in_time(self, conn)
  local job = staying.run(self.turned, function()
    return life.exiting and self.leave_by + GOODBYE - now() or nil
  end, self.config.serve, conn, self)
  local _, reason = conn:state()
  self.failure = job.whole and job.result or reason
  if not job.over then
    conn:close(GOODBYE)
    if self.config.forsaken then self.config.forsaken() end
    local until_then = now() + GOODBYE
    while not job.over and now() < until_then do self.turned:wait(until_then - now()) end
  end
  return job
end

local function serve(self, conn)
  self.state, self.failure = "open", nil
  local began = now()
  self.sessions = self.sessions + 1
  local watch = self.config.watch
  if watch then watch:opened(conn) end
  local job = serve_in_time(self, conn)
  if watch then watch:lost(not life.exiting and self.failure or nil) end
  -- One that ends as soon as it has begun must not begin again as soon.
  self.attempt = now() - began < SHORT and self.attempt + 1 or 0
  abandon(self)
  if conn:is_open() then conn:close(GOODBYE) end
  if job.whole == false then error(job.result, 0) end
end

local function attempt(self)
  self.state = "connecting"
  local conn, err = self:connect(self.config.connect)
  if conn then
    runtime.log("info", self.config.name .. ": connected to " .. conn.endpoint)
    return serve(self, conn)
  end
  self.failure = err
  if self.config.watch then self.config.watch:lost(not life.exiting and err or nil) end
  self.attempt = self.attempt + 1
  if err.temporary == false then self:seldom() end
  self.config.failed(err)
end

-- Ends it, if the worker leaves and has no need of this connection or no time for it.
local function is_over(self)
  life.look()
  if not life.exiting or self.config.wanted() and not self:overdue() then return false end
  abandon(self)
  self.state, self.begun = "idle", nil
  return true
end

-- Whether a timer that begins is the next one. `begun` is what it was planned with, and whoever planned it waits on; it may
-- have been given up, or another that was planned with the same has come before it.
local function is_next(self, begun)
  if begun ~= self.begun then return false end
  self.begun = nil
  begun:post(1)
  return true
end

local function go_on(self)
  repeat
    local ok, problem = xpcall(runtime.pooled, debug.traceback, attempt, self)
    if not ok then
      runtime.log("error", self.config.name .. ": " .. tostring(problem))
      self.attempt = self.attempt + 1
    end
  until self:again()
end

local function on_timer(_, self, begun)
  if is_next(self, begun) and not is_over(self) then go_on(self) end
end

-- A delay that a worker which leaves can still wait for.
local function wait_then_try(_, self, begun, delay)
  if not is_next(self, begun) then return end
  ngx.sleep(delay)
  go_on(self)
end

-- Plans a timer. Returns what is posted to once it has begun, and the seconds until then.
local function plan(self, delay)
  local begun = semaphore.new()
  self.begun = begun
  if not life.exiting and timer_at(delay, on_timer, self, begun) then return begun, delay end
  if self.leave_by then delay = math.min(delay, self.leave_by - now()) end
  local ok, err = timer_at(0, wait_then_try, self, begun, math.max(delay, 0.001))
  if not ok then
    runtime.log("error", self.config.name .. ": cannot start a timer: " .. tostring(err))
    return begun, delay
  end
  return begun, 0
end

--- Plans the next attempt, if there is to be one, and waits until its timer has begun: nginx forgets timers that are due
--- while `lua_max_running_timers` run or it has no connection left (worker_connections).
---@return boolean done  false: the next attempt is the calling timer's
function Keeper:again()
  if is_over(self) then return true end
  local delay = self:delay()
  self.state = "waiting"
  if self.failure then
    runtime.log("warn", ("%s: %s; trying again in %.1f s"):format(self.config.name, tostring(self.failure), delay))
  end
  local begun, due = plan(self, delay)
  -- After a stall the timer may have begun in the very turn in which the wait for it timed out.
  if begun:wait(math.max(0, due) + LATE) or begun:wait(0) then return true end
  runtime.log("warn", self.config.name .. ": nginx has not run the timer of the next attempt (lua_max_running_timers,"
    .. " worker_connections): the one before it goes on")
  self.begun = nil
  return false
end

-- nginx has not run the first timer, though it was due long ago.
local function is_late(self) return self.state == "starting" and now() - self.started >= LATE end

--- Begins, or begins again: in a worker that is leaving, or where nginx has not run the timer. False: there can be no timer.
---@return boolean
function Keeper:start()
  if is_late(self) then
    runtime.log("warn", self.config.name .. ": nginx has not run the first timer (lua_max_running_timers,"
      .. " worker_connections): it is started again")
  elseif self.state ~= "idle" then
    return true
  else
    self.begun = semaphore.new()
    if life.exiting then self.leave_by = now() + self.config.exit_timeout end
  end
  self.state, self.started = "starting", now()
  local ok, err = timer_at(0, on_timer, self, self.begun)
  if not ok then
    self.state = "idle"
    runtime.log("error", self.config.name .. ": cannot start a timer: " .. tostring(err))
  end
  return ok and true or false
end

-- Further timers for a first one that nginx may forget, for maybe nobody asks for this connection. They do nothing once one
-- has begun.
local function give_chances(self)
  if life.exiting then return end
  for _, delay in ipairs(MORE_CHANCES) do timer_at(delay, on_timer, self, self.begun) end
end

--- Starts it if it is not at work: whoever has something for it to do calls this. False: there can be no timer.
---@return boolean
function Keeper:need()
  local state = self.state
  return state ~= "idle" and state ~= "starting" or self:start()
end

--- Keeps a connection. config: `name` for the log, `connect` () -> Connection or nil, err, `serve` (conn, keeper) runs
--- while it lasts and returns why it ended, `wanted` () -> whether one is needed still (asked while the worker leaves),
--- `failed` (err) hears of attempts that failed, `abandon` () is called when the worker leaves although it is wanted,
--- `backoff` { first, factor, max, jitter }, `exit_timeout` in seconds, `watch` may hear of it: opened(self, conn),
--- lost(self, err); and `forsaken` (), if given, is called when `serve` has not ended in time: conn is closed.
---@param config table
---@return moonrabbit.resty.Keeper
function Keeper.new(config)
  local self = setmetatable({
    config = config, state = "idle", sessions = 0, attempt = 0, started = 0, backoff = Backoff.new(config.backoff),
    turned = runtime.condition(),
  }, Keeper)
  life.on_exit(function()
    self.leave_by = now() + config.exit_timeout
    self.turned:broadcast()
  end)
  if self:start() then give_chances(self) end
  return self
end

return Keeper
