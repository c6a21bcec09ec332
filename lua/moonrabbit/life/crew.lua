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

for _, part in ipairs { "watch", "reload" } do
  for name, method in pairs(require("moonrabbit.life.crew." .. part)) do Crew[name] = method end
end

--- Short lives in a row after which a worker is given up.
local MOST_FAILURES = 5

--- Seconds that a worker may take over --drain, and over a reload.
local crew = { GRACE = 15 }
Crew.GRACE = crew.GRACE


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

--- How many workers consume.
---@return integer
function Crew:count_at_work() return count(self, function(member) return member:works() end) end

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
  local ready = self:count_at_work()
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
  return member.failures >= MOST_FAILURES and self:count_at_work() == 0
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
  self.phase, self.deadline = "stopping", self.runtime.now() + self.drain + self.GRACE
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
  self.runtime.spawn(self.watch, self, notify.watchdog())
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
