--- A connection that is kept while its worker lives.
--
-- Every attempt to connect, and every session, has a timer of its own: nginx frees what a timer has used
-- only when it ends, so one that reconnected for ever would grow for ever.
-- @module moonrabbit.resty.keeper

local life = require "moonrabbit.resty.life"
local random = require "moonrabbit.random"
local runtime = require "moonrabbit.runtime.resty"
local semaphore = require "ngx.semaphore"

local now, timer_at = runtime.now, life.timer_at

-- A worker that leaves tells the broker goodbye for so long.
local GOODBYE = 1
-- A session that ended before this many seconds counts as an attempt that failed.
local SHORT = 2
-- A number of attempts after which they are as far apart as they come.
local SELDOM = 20
-- A timer that has not begun so long after it was due never will.
local LATE = 1

---@class moonrabbit.resty.Keeper
---@field state "idle"|"connecting"|"open"|"waiting"
---@field failure moonrabbit.Error?  why the last attempt failed, or the last session ended
---@field sessions integer           how many there have been
---@field attempt integer            how many have failed since one was well
---@field leave_by number?           when the worker must have left
local Keeper = {}
Keeper.__index = Keeper

--- Keeps a connection. config: `name` for the log, `connect` (limit) -> Connection or nil, err, within `limit` seconds
--- if given, `serve` (conn, keeper) runs while it lasts and returns why it ended, `wanted` () -> whether one is needed
--- still (asked while the worker leaves), `failed` (err) hears of attempts that failed, `backoff` { first, factor, max,
--- jitter }, `exit_timeout` in seconds, `watch` may hear of it: opened(self, conn), lost(self, err).
---@param config table
---@return moonrabbit.resty.Keeper
function Keeper.new(config)
  local self = setmetatable({ config = config, state = "idle", sessions = 0, attempt = 0 }, Keeper)
  life.on_exit(function() self.leave_by = now() + config.exit_timeout end)
  self:start()
  return self
end

--- Whether the worker has stayed for this connection as long as it may.
function Keeper:overdue() return life.exiting and now() >= (self.leave_by or 0) end

function Keeper:backoff()
  local backoff = self.config.backoff
  local delay = math.min(backoff.max, backoff.first * backoff.factor ^ math.max(0, self.attempt - 1))
  return delay * (1 + backoff.jitter * (2 * random.number() - 1))
end

--- What trying again does not help against is tried as seldom as can be.
function Keeper:seldom() self.attempt = math.max(self.attempt, SELDOM) end

local function serve(self, conn)
  self.state, self.failure = "open", nil
  local began = now()
  self.sessions = self.sessions + 1
  local watch = self.config.watch
  if watch then watch:opened(conn) end
  local whole, ended = xpcall(self.config.serve, debug.traceback, conn, self)
  local _, reason = conn:state()
  self.failure = whole and ended or reason
  if watch then watch:lost(not life.exiting and self.failure or nil) end
  -- One that ends as soon as it has begun must not begin again as soon.
  self.attempt = now() - began < SHORT and self.attempt + 1 or 0
  if conn:is_open() then conn:close(life.exiting and GOODBYE or nil) end
  if not whole then error(ended, 0) end
end

local function attempt(self)
  self.state = "connecting"
  local conn, err = self.config.connect(life.exiting and math.max(0.1, self.leave_by - now()) or nil)
  if conn then
    runtime.log("info", self.config.name .. ": connected to " .. conn.endpoint)
    return serve(self, conn)
  end
  self.failure = err
  if self.config.watch then self.config.watch:lost(err) end
  self.attempt = self.attempt + 1
  if err.temporary == false then self:seldom() end
  self.config.failed(err)
end

-- Ends it, if the worker leaves and has no need of this connection or no time for it.
local function is_over(self)
  life.look()
  if not life.exiting or self.config.wanted() and not self:overdue() then return false end
  self.state, self.begun = "idle", nil
  return true
end

-- The body of a timer. `begun`: what the timer before it waits on, which may have given this one up.
local function on_timer(_, self, begun)
  if begun ~= self.begun then return end
  if begun then
    begun:post(1)
    if is_over(self) then return end
  end
  repeat
    local ok, problem = xpcall(runtime.pooled, debug.traceback, attempt, self)
    if not ok then
      runtime.log("error", self.config.name .. ": " .. tostring(problem))
      self.attempt = self.attempt + 1
    end
  until self:again()
end

-- A delay that a worker which leaves can still wait for.
local function wait_then_try(_, self, begun, delay)
  if begun ~= self.begun then return end
  begun:post(1)
  ngx.sleep(delay)
  self.begun = nil
  on_timer(nil, self)
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
  local delay = self:backoff()
  self.state = "waiting"
  if self.failure then
    runtime.log("warn", ("%s: %s; trying again in %.1f s"):format(self.config.name, tostring(self.failure), delay))
  end
  local begun, due = plan(self, delay)
  if begun:wait(math.max(0, due) + LATE) then return true end
  runtime.log("warn", self.config.name .. ": nginx has not run the timer of the next attempt (lua_max_running_timers,"
    .. " worker_connections): the one before it goes on")
  self.begun = nil
  return false
end

--- Begins, or begins again in a worker that is leaving. False: there can be no timer.
---@return boolean
function Keeper:start()
  if self.state ~= "idle" then return true end
  self.state, self.begun = "connecting", nil
  if life.exiting then self.leave_by = now() + self.config.exit_timeout end
  local ok, err = timer_at(0, on_timer, self)
  if not ok then
    self.state = "idle"
    runtime.log("error", self.config.name .. ": cannot start a timer: " .. tostring(err))
  end
  return ok and true or false
end

return Keeper
