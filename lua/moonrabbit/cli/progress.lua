--- One line on stderr that tells how far long work is: on terminals only, and not in the first second.

local output = require "moonrabbit.cli.output"

local progress = {}
progress.__index = progress

-- Lua has no isatty; asking the shell costs a process, so only work that takes long asks.
local terminal
local function stderr_is_terminal()
  if terminal == nil then
    local status = os.execute "test -t 2"
    terminal = status == true or status == 0
  end
  return terminal
end

--- what: a word such as "published"; total: how many there will be, or nil; now: a clock.
function progress.new(what, total, now)
  return setmetatable({
    what = what, total = total, now = now, started = now(), next = now() + 1, shown = false,
    off = output.is_quiet(),
  }, progress)
end

local function clock(seconds)
  seconds = math.floor(seconds + 0.5)
  if seconds < 60 then return seconds .. " s" end
  return ("%d:%02d"):format(math.floor(seconds / 60), seconds % 60)
end

function progress:update(done)
  if self.off then return end
  local now = self.now()
  if now < self.next then return end
  if not stderr_is_terminal() then
    self.off = true
    return
  end
  self.next = now + 0.1
  self.shown = true
  local elapsed = now - self.started
  local rate = done / elapsed
  local text = ("%s %d"):format(self.what, done)
  if self.total then
    text = ("%s of %d (%d%%)"):format(text, self.total, math.floor(100 * done / math.max(self.total, 1)))
  end
  text = ("%s, %.0f/s, %s"):format(text, rate, clock(elapsed))
  if self.total and rate > 0 then text = text .. ", " .. clock((self.total - done) / rate) .. " left" end
  io.stderr:write("\r\27[K", text)
end

--- Takes the line away.
function progress:finish()
  if self.shown then io.stderr:write "\r\27[K" end
  self.off = true
end

return progress
