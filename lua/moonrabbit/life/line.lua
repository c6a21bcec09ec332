--- The line between a parent and one of its workers: a pair of sockets, and words with texts on it.
--
-- A word goes as `WORD LENGTH\n` and the text. Sending never waits: a task of its own writes. Whoever asks waits for the
-- next text under the same word.
--
-- | word | |
-- | --- | --- |
-- | `hello` | worker: it can be stopped by a signal |
-- | `ready` | worker: it consumes for the first time |
-- | `page` | parent asks; worker answers why it is not ready, or nothing, a line's end, and its page of metrics; its last word too |
-- | `reload` | parent asks; worker answers what is wrong with the script, or nothing |
-- @module moonrabbit.life.line

-- What is longer is no page of metrics.
local LONGEST = 64 * 1024 * 1024
-- A peer that reads nothing for so long has gone, but for its process.
local PATIENCE = 60

---@class moonrabbit.life.Line
local Line = {}
Line.__index = Line

local line = {}

---@param runtime table
---@param transport table
---@return moonrabbit.life.Line
function line.new(runtime, transport)
  return setmetatable({
    runtime = runtime, transport = transport, open = true, out = {}, writing = false, pending = "",
    answers = {}, changed = runtime.condition(),
  }, Line)
end

local function write_all(self)
  while self.open and #self.out > 0 do
    local bytes = table.concat(self.out)
    self.out = {}
    if not self.transport:write(bytes, PATIENCE) then self:close() end
  end
  self.writing = false
  self.changed:broadcast()
end

--- Sends a word.
---@param word string
---@param text string?
function Line:send(word, text)
  if not self.open then return end
  text = text or ""
  self.out[#self.out + 1] = ("%s %d\n"):format(word, #text)
  self.out[#self.out + 1] = text
  if self.writing then return end
  self.writing = true
  self.runtime.spawn(write_all, self)
end

local function take(self, word, text)
  local waiting = self.answers[word]
  if not waiting then return end
  self.answers[word] = { text = text, number = waiting.number + 1 }
  self.changed:broadcast()
end

local function more(self)
  local bytes = self.transport:read(65536)
  if not bytes then return false end
  self.pending = self.pending .. bytes
  return true
end

local function next_word(self)
  local word, length, after
  repeat
    word, length, after = self.pending:match "^(%l+) (%d+)\n()"
  until word or not more(self)
  length = tonumber(length)
  if not word or length > LONGEST then return nil end
  local parts, have = { self.pending:sub(after) }, #self.pending - after + 1
  self.pending = ""
  while have < length do -- a long text is not joined again and again
    local bytes = self.transport:read(65536)
    if not bytes then return nil end
    parts[#parts + 1], have = bytes, have + #bytes
  end
  local text = table.concat(parts)
  self.pending = text:sub(length + 1)
  return word, text:sub(1, length)
end

--- Waits for the next word; nil: the other end has gone. One task reads.
---@return string|nil word, string? text
function Line:receive()
  local word, text = next_word(self)
  if not word then
    self:close()
    return nil
  end
  take(self, word, text)
  return word, text
end

--- Sends a word and waits for its answer, while another task receives; nil: there was none in time.
---@param word string
---@param timeout number seconds
---@return string?
function Line:ask(word, timeout)
  local now = self.runtime.now
  local deadline = now() + timeout
  local before = self.answers[word] and self.answers[word].number or 0
  self.answers[word] = self.answers[word] or { number = 0 }
  self:send(word)
  while self.open and self.answers[word].number == before do
    local left = deadline - now()
    if left <= 0 then return nil end
    self.changed:wait(left)
  end
  return self.answers[word].number > before and self.answers[word].text or nil
end

--- Waits until all that was said is on its way.
---@param timeout number seconds
function Line:flush(timeout)
  local now = self.runtime.now
  local deadline = now() + timeout
  while self.open and self.writing and now() < deadline do self.changed:wait(deadline - now()) end
end

--- Idempotent.
function Line:close()
  if not self.open then return end
  self.open = false
  self.transport:close()
  self.changed:broadcast()
end

return line
