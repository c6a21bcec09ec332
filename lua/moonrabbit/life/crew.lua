--- The parent of workers: `moonrabbit run --workers N`.
--
-- The parent runs none of the script's code. Its first worker leads: until it consumes it is alone, so what is wrong
-- with the script, the password or the declarations is said once, and ends it all. Then the others start.
--
-- A worker that ends is replaced, after a pause that grows from 0.2 to 30 s while its lives are short. When one has
-- had five short lives in a row and no other is at work either, the parent gives up. SIGTERM is passed on; a worker
-- that does not end in time is killed. A reload goes from one worker to the next, and stops at the first that refuses
-- the script.
--
-- The page of metrics is the sum of theirs, and of those that have gone; no counter falls.
-- @module moonrabbit.life.crew

local Member = require "moonrabbit.life.member"
local notify = require "moonrabbit.life.notify"
local sum = require "moonrabbit.metrics.sum"

---@class moonrabbit.life.CrewOptions
---@field runtime table
---@field count integer
---@field words fun(number: integer): string[]  the command line of a worker
---@field drain number                 seconds
---@field log fun(level: string, text: string, fields: table?)

---@class moonrabbit.life.Crew
---@field members moonrabbit.life.Member[]
---@field phase "starting"|"running"|"stopping"  starting: nobody has ever consumed
local Crew = {}
Crew.__index = Crew

local crew = {}

--- Short lives in a row after which a worker is given up.
local MOST_FAILURES = 5
--- How long a worker may take over --drain, and over a reload.
local GRACE = 15
--- How long a page may take, and how often each worker is looked at.
local PATIENCE, INTERVAL = 2, 5
--- A worker that has said nothing for so long is not healthy.
local STUCK = 30

---@param opts moonrabbit.life.CrewOptions
---@return moonrabbit.life.Crew
function crew.new(opts)
  local self = setmetatable({
    runtime = opts.runtime, drain = opts.drain, log = opts.log, phase = "starting", code = 0, members = {},
    changed = opts.runtime.condition(), own = require("moonrabbit.metrics").new(), gone = "", highest = {},
    told = false, killed = false,
  }, Crew)
  local function heard(member, word) self:heard(member, word) end
  for n = 1, opts.count do self.members[n] = Member.new(opts.runtime, n, opts.words(n), heard) end
  self.own.families.workers:with():set(opts.count)
  self.own.families.worker_restarts_total:with()
  return self
end

local function count(self, holds)
  local n = 0
  for _, member in ipairs(self.members) do
    if holds(member) then n = n + 1 end
  end
  return n
end

local function lives(member) return member.pid ~= false end
local function works(member) return member.ready and member.problem == nil end

-- ---- Starting ---------------------------------------------------------------------------------------

function Crew:heard(member, word)
  self.changed:broadcast()
  if word ~= "ready" or self.phase == "stopping" then return end
  self.log("info", ("worker %d runs"):format(member.number), { pid = member.pid })
  if self.phase == "starting" then
    self.phase = "running"
    for _, other in ipairs(self.members) do
      if not other.pid then other.due = self.runtime.now() end
    end
  end
  local ready = count(self, works)
  notify.send(("STATUS=%d of %d workers run"):format(ready, #self.members))
  if ready == #self.members and not self.told then
    self.told = true
    notify.send "READY=1"
  end
end

local function start_due(self)
  for _, member in ipairs(self.members) do
    if member.due and member.due <= self.runtime.now() then
      local ok, err = member:start()
      if not ok then
        self.log("error", ("worker %d cannot be started: %s (again in %.1f s)"):format(member.number, err,
          member:postpone()))
      end
    end
  end
end

-- ---- Ends -------------------------------------------------------------------------------------------

-- Codes by which the command line says that trying again is of no use.
local function is_final(code) return code >= 1 and code <= 4 end

local function gives_up(self, member, code)
  if self.phase == "starting" and is_final(code) then return true end
  return member.failures >= MOST_FAILURES and count(self, works) == 0
end

local function described(member, pid, code)
  if code > 128 and code < 128 + 65 then
    return ("worker %d (process %d) ended by signal %d"):format(member.number, pid, code - 128)
  end
  return ("worker %d (process %d) ended with %d"):format(member.number, pid, code)
end

local function ended_while_stopping(self, member, code, text)
  -- A worker that had not come to watch signals had no message either.
  if code == 0 or code == 143 and not member.hello or self.killed then return end
  self.log("warn", text)
  if self.code == 0 then self.code = code end
end

local function ended(self, member, pid, code)
  self.gone = sum.lasting(sum.sum { self.gone, member.page })
  member.page = ""
  local text = described(member, pid, code)
  if self.phase == "stopping" then return ended_while_stopping(self, member, code, text) end
  if gives_up(self, member, code) then
    self.code = code == 0 and 1 or code
    self.log("error", text .. (member.failures < MOST_FAILURES and ": the others would too"
      or (", the %dth time in a row: it is given up"):format(member.failures)))
    return self:stop()
  end
  self.own.families.worker_restarts_total:with():inc()
  self.log("warn", ("%s: another takes its place in %.1f s"):format(text, member:postpone()))
end

local function reap(self)
  for _, member in ipairs(self.members) do
    local pid = member.pid
    local code = member:ended()
    if code then ended(self, member, pid, code) end
  end
end

local function kill_all(self)
  for _, member in ipairs(self.members) do member:signal "KILL" end
end

--- Every worker takes no more messages, handles those that it has, and ends; the second time they end at once.
---@param code integer? the exit code of the second time
function Crew:stop(code)
  if self.phase == "stopping" then
    self.code, self.killed = code or self.code, true
    return kill_all(self)
  end
  self.phase, self.deadline = "stopping", self.runtime.now() + self.drain + GRACE
  notify.send("STOPPING=1", "STATUS=draining")
  self.log("info", "stopping the workers")
  for _, member in ipairs(self.members) do
    member.due = false
    member:signal "TERM"
  end
  self.changed:broadcast()
end

local function kill_late(self)
  if self.phase ~= "stopping" or self.killed or self.runtime.now() < self.deadline then return end
  self.log("error", ("%d workers have not ended in time, and are killed"):format(count(self, lives)))
  self.code, self.killed = self.code == 0 and 1 or self.code, true
  kill_all(self)
end

-- ---- Reload -----------------------------------------------------------------------------------------

local function reload_one_by_one(self)
  local done = 0
  for _, member in ipairs(self.members) do
    if self.phase == "stopping" then return end
    if member.ready then
      local ok, why = member:reload(self.drain + GRACE)
      if ok then
        done = done + 1
      elseif member.ready then
        self.log("error", ("worker %d has not reloaded (%d before it have): %s"):format(member.number, done, why))
        return
      end
    elseif member.pid then
      member.line:send "reload" -- it will when it has started
    end
  end
  self.log("info", ("%d workers have reloaded"):format(done))
end

--- Every worker loads its script again, one after the other.
function Crew:reload()
  self.again = true
  if self.reloading or self.phase == "stopping" then return end
  self.reloading = true
  notify.reloading()
  self.runtime.spawn(function()
    while self.again do
      self.again = false
      reload_one_by_one(self)
    end
    self.reloading = false
    if self.phase == "running" then notify.send "READY=1" end
  end)
end

-- ---- What is asked of it ----------------------------------------------------------------------------

local function look_at_all(self)
  local left, done = 0, self.runtime.condition()
  for _, member in ipairs(self.members) do
    if member.pid then
      left = left + 1
      self.runtime.spawn(function()
        member:look(PATIENCE)
        left = left - 1
        done:signal()
      end)
    end
  end
  while left > 0 do done:wait() end
end

--- The sum of the pages of metrics.
---@return string
function Crew:page()
  look_at_all(self)
  self.own.families.workers_ready:with():set(count(self, works))
  local pages = { self.own:text(), self.gone }
  for _, member in ipairs(self.members) do pages[#pages + 1] = member.page end
  return sum.sum(pages, self.highest)
end

local function checks(self, problem_of)
  local list = {}
  for i, member in ipairs(self.members) do
    list[i] = { name = "worker " .. member.number, check = function()
      local problem = problem_of(member)
      if problem then return nil, problem end
      return true
    end }
  end
  return list
end

--- For `/readyz`: all of them are.
---@return table[]
function Crew:ready()
  look_at_all(self)
  return checks(self, function(member) return not works(member) and (member.problem or "it starts") or nil end)
end

local function silent_for(self, member, seconds)
  return member.ready and member.pid and self.runtime.now() - member.answered > seconds
end

--- For `/healthz`: none of them is stuck.
---@return table[]
function Crew:healthy()
  return checks(self, function(member) return silent_for(self, member, STUCK) and "it does not answer" or nil end)
end

-- Keeps their pages fresh. Under systemd's watchdog a worker whose loop is held up is replaced.
local function watch(self, watchdog)
  while true do
    self.runtime.sleep(math.min(INTERVAL, watchdog or INTERVAL))
    notify.send "WATCHDOG=1"
    look_at_all(self)
    for _, member in ipairs(self.members) do
      if watchdog and silent_for(self, member, 2 * watchdog + PATIENCE) then
        self.log("error", ("worker %d does not answer, and is killed"):format(member.number))
        member:signal "KILL"
      end
    end
  end
end

-- ---- All of it --------------------------------------------------------------------------------------

-- Seconds until something is due; what else happens wakes it.
local function pause(self)
  local seconds = 1
  for _, member in ipairs(self.members) do
    if member.due then seconds = math.min(seconds, math.max(0, member.due - self.runtime.now())) end
  end
  return seconds
end

--- Runs the workers until they are stopped, or given up.
---@return integer exit_code
function Crew:run()
  self.runtime.signal("CHLD", function() self.changed:broadcast() end)
  self.members[1].due = self.runtime.now()
  self.runtime.spawn(watch, self, notify.watchdog())
  while self.phase ~= "stopping" or count(self, lives) > 0 do
    start_due(self)
    self.changed:wait(pause(self))
    reap(self)
    kill_late(self)
  end
  self.runtime.signal("CHLD", nil)
  return self.code
end

return crew
