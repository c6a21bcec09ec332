--- One of the workers, as their parent knows it: its process, its line, its page of metrics.
-- @module moonrabbit.life.member

local Backoff = require "moonrabbit.connection.backoff"
local line = require "moonrabbit.life.line"
local net = require "moonrabbit.net"

---@class moonrabbit.life.Member
---@field number integer
---@field pid integer|false      while its process lives
---@field ready boolean           whether this process has consumed
---@field hello boolean           whether a signal stops it in good order
---@field due number|false        when it is to be started
---@field failures integer        lives in a row that were too short
---@field page string             its metrics, as they were last seen
---@field problem string?         why it is not ready
---@field answered number         when it was last heard of
local Member = {}
Member.__index = Member

local member = {}

--- Whoever was ready for so long had a life.
local SOUND = 10
--- Seconds that what it said before it ended may take to come.
local LAST_WORDS = 1

---@param runtime table
---@param number integer
---@param words string[] its command line
---@param heard fun(self: moonrabbit.life.Member, word: string?) called for each word, and for the end of the line
---@return moonrabbit.life.Member
function member.new(runtime, number, words, heard)
  return setmetatable({
    runtime = runtime, number = number, words = words, heard = heard, pid = false, ready = false, hello = false,
    due = false, failures = 0, page = "", problem = "it has not started", answered = 0,
    backoff = Backoff.new { first = 0.2, max = 30, stable = SOUND },
  }, Member)
end

local words = {
  hello = function(self) self.hello = true end,
  ready = function(self) self.ready, self.ready_at, self.problem = true, self.answered, nil end,
  page = function(self, text)
    self.problem, self.page = text:match "^([^\n]*)\n(.*)$"
    if self.problem == "" then self.problem = nil end
  end,
}

local function listen(self, own)
  local word, text = own:receive()
  while word do
    self.answered = self.runtime.now()
    if words[word] then words[word](self, text) end
    self:heard(word)
    word, text = own:receive()
  end
  self:heard(nil)
end

--- Whether it consumes.
---@return boolean
function Member:works() return self.ready and self.problem == nil end

--- Starts its process.
---@return true|nil, string?
function Member:start()
  self.due = false
  local pid, stream = net.spawn(self.words, true)
  if not pid then return nil, stream end
  self.pid, self.ready, self.hello, self.problem = pid, false, false, "it starts"
  self.page, self.answered = "", self.runtime.now()
  self.line = line.new(self.runtime, self.runtime.transport(stream))
  self.runtime.spawn(listen, self, self.line)
  return true
end

--- Asks for its page and whether it is ready, unless it has ended meanwhile.
---@param timeout number seconds
function Member:look(timeout)
  local own = self.line
  if not self.pid or own:ask("page", timeout) or not own.open or own ~= self.line then return end
  if self.ready then self.problem = "it does not answer" end
end

--- Asks it to load its script again: true; nil, and why it has not.
---@param timeout number seconds
---@return true|nil, string?
function Member:reload(timeout)
  local problem = self.line:ask("reload", timeout)
  if problem == "" then return true end
  return nil, problem or "it does not answer"
end

--- Sends a signal to its process.
---@param name string
function Member:signal(name)
  if self.pid and not self.code then net.kill(self.pid, name) end
end

-- Its last words may still be on the line.
local function has_ended(self)
  if not self.pid then return false end
  if not self.code then
    local code, err = net.wait(self.pid)
    if not code and not err then return false end
    self.code, self.ended_at = code or 1, self.runtime.now()
  end
  return not self.line.open or self.runtime.now() - self.ended_at >= LAST_WORDS
end

--- How its process has ended, once: exit code, or 128 and the signal's number. nil: it lives, or was none.
---@return integer?
function Member:ended()
  if not has_ended(self) then return nil end
  local code, lasted = self.code, self.ready and self.ended_at - self.ready_at or 0
  self.line:close()
  self.backoff:lasted(lasted)
  self.failures = lasted >= SOUND and 1 or self.failures + 1
  self.pid, self.code, self.ready, self.problem = false, nil, false, "it has ended"
  return code
end

--- It is to be started again, after a pause that grows when it keeps ending.
---@return number seconds
function Member:postpone()
  local seconds = self.backoff:next()
  self.due = self.runtime.now() + seconds
  return seconds
end

return member
