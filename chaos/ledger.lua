--- The ledger: what a worker saw, a line for each thing, written so that kill -9 loses none of it.
--
--     TIME <tab> KIND <tab> QUEUE <tab> SERIAL <tab> TEXT
--
-- KIND is `sent` (accepted, and in the outbox), `confirmed`, `failed`, `delivered` or `event`. TIME is the
-- machine's monotonic clock, so the ledgers of several processes fit together.
local net = require "moonrabbit.net"

local ledger = {}

local Ledger = {}
Ledger.__index = Ledger

--- Opens one for writing; an older one is continued.
function ledger.open(path)
  local file = assert(io.open(path, "ab"))
  file:setvbuf "no" -- each line is one write
  return setmetatable({ file = file }, Ledger)
end

function Ledger:write(kind, queue, serial, text)
  self.file:write(("%.4f\t%s\t%s\t%d\t%s\n"):format(net.now(), kind, queue, serial or 0,
    (tostring(text or ""):gsub("[\t\n]", " "))))
end

local Reader = {}
Reader.__index = Reader

--- Follows one that is being written. `entries`: a list of { at, kind, queue, serial, text }.
function ledger.follow(path)
  return setmetatable({ path = path, offset = 0, rest = "", entries = {}, count = {} }, Reader)
end

--- Takes in what is new; the reader itself.
function Reader:read()
  local file = io.open(self.path, "rb")
  if not file then return self end
  file:seek("set", self.offset)
  local text = file:read "*a"
  file:close()
  self.offset = self.offset + #text
  text = self.rest .. text
  local whole = text:match "^.*\n" or ""
  self.rest = text:sub(#whole + 1)
  for at, kind, queue, serial, more in whole:gmatch "([^\t\n]*)\t([^\t\n]*)\t([^\t\n]*)\t([^\t\n]*)\t([^\n]*)\n" do
    self.entries[#self.entries + 1] =
      { at = tonumber(at), kind = kind, queue = queue, serial = tonumber(serial), text = more }
    local key = kind .. "\t" .. queue
    self.count[key] = (self.count[key] or 0) + 1
  end
  return self
end

--- How many entries of a kind there are for a queue.
function Reader:counted(kind, queue) return self.count[kind .. "\t" .. queue] or 0 end

return ledger
