--- The terminal of `moonrabbit top`: its size, its keys, its other screen; and all of it put back at the end.
--
-- By stty, for Lua has no terminal functions. In its other screen the terminal keeps what was there before; input comes
-- key by key and is not shown; Ctrl-C remains a signal.

local terminal = {}

local function stty(words)
  local pipe = io.popen("stty " .. words .. " < /dev/tty 2> /dev/null")
  if not pipe then return nil end
  local text = pipe:read "*a"
  pipe:close()
  return text
end

--- Whether stdout is a terminal.
---@return boolean
function terminal.is_stdout()
  local status = os.execute "test -t 1"
  return status == true or status == 0
end

--- Columns and rows of the terminal; 80 and 24 where nobody can tell.
---@return integer width, integer height
function terminal.size()
  local rows, columns = (stty "size" or ""):match "^(%d+) (%d+)"
  columns = tonumber(columns) or tonumber(os.getenv "COLUMNS" or "") or 80
  rows = tonumber(rows) or tonumber(os.getenv "LINES" or "") or 24
  if columns < 1 then columns = 80 end
  if rows < 1 then rows = 24 end
  return columns, rows
end

---@class moonrabbit.cli.Terminal
local Terminal = {}
Terminal.__index = Terminal

--- Takes the terminal over. To be ended by `restore`.
---@return moonrabbit.cli.Terminal
function terminal.open()
  local saved = (stty "-g" or ""):match "^[%w:=]+"
  local self = setmetatable({ saved = saved, keys_file = nil }, Terminal)
  if saved then
    stty "-icanon -echo min 0 time 0 susp undef" -- a read gives what is there, and waits for nothing
    self.keys_file = io.open("/dev/tty", "rb")
  end
  io.stdout:write "\27[?1049h\27[?25l"
  return self
end

--- Whether keys can be read.
function Terminal:has_keys() return self.keys_file ~= nil end

--- The keys that were pressed since: a string, mostly empty. Sequences of function keys are left out.
---@return string
function Terminal:keys()
  if not self.keys_file then return "" end
  local keys = {}
  for _ = 1, 64 do
    local key = self.keys_file:read(1)
    if not key then break end
    keys[#keys + 1] = key
  end
  return (table.concat(keys):gsub("\27[%[O][%d;]*%a?", ""):gsub("\27", ""))
end

local styles = { title = "\27[1m", header = "\27[7m", footer = "\27[2m" }

--- Shows lines from the top; nil, err when the terminal is gone.
---@param lines table[] of screen.lines
---@param plain boolean without colours
---@return true|nil, string?
function Terminal:draw(lines, plain)
  local out = { "\27[H" }
  for i, line in ipairs(lines) do
    local style = not plain and (line.ill and "\27[31m" or styles[line.kind]) or ""
    out[#out + 1] = style .. line.text .. (style ~= "" and "\27[0m" or "") .. "\27[K" .. (i < #lines and "\r\n" or "")
  end
  out[#out + 1] = "\27[J"
  local ok, err = io.stdout:write(table.concat(out))
  if ok then ok, err = io.stdout:flush() end
  return ok and true or nil, err
end

--- Puts everything back. May be called twice.
function Terminal:restore()
  if self.over then return end
  self.over = true
  io.stdout:write "\27[?25h\27[?1049l"
  io.stdout:flush()
  if self.keys_file then self.keys_file:close() end
  if self.saved then stty(self.saved) end
end

return terminal
