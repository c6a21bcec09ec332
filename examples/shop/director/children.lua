--- Child processes: the shop's apps by `moonrabbit run`, other commands of moonrabbit, and what else takes time. Nothing
-- here blocks the loop, and none outlives this process: on Linux a child gets SIGTERM when its parent dies.
local mr = require "moonrabbit"
local net = require "moonrabbit.net"
local now = require "moonrabbit.runtime.native".now

local children = {}

local function quote(text) return "'" .. tostring(text):gsub("'", "'\\''") .. "'" end
children.quote = quote

local function slurp(path)
  local file = io.open(path, "rb")
  if not file then return "" end
  local text = file:read "*a"
  file:close()
  return text
end
children.slurp = slurp

-- The interpreter that runs this, whatever options it was given.
local function interpreter()
  local i = 0
  while arg[i - 1] do i = i - 1 end
  return arg[i]
end

local function exists(path)
  local file = io.open(path)
  if file then file:close() end
  return file ~= nil
end

local Child = {}
Child.__index = Child

-- `exec` in the shell keeps the number: the child is the program itself.
local function spawn(name, command, output, log)
  local from = #slurp(log) + 1
  local whole = ("exec %s < /dev/null > %s 2>> %s"):format(command, quote(output), quote(log))
  local pid, err = net.spawn { "sh", "-c", whole }
  if not pid then return nil, err end
  return setmetatable({ name = name, pid = pid, output = output, log = log, from = from }, Child)
end

--- What this family is made with: root (the checkout's folder), folder (of files), environment (a table).
function children.new(opts)
  local self = { opts = opts, all = {}, serial = 0 }

  local function environment()
    -- The versions' own variables come before the plain ones.
    local parts = { "env -u MOONRABBIT_URL -u LUA_INIT" }
    for _, version in ipairs { "5_2", "5_3", "5_4" } do
      parts[#parts + 1] = ("-u LUA_PATH_%s -u LUA_CPATH_%s -u LUA_INIT_%s"):format(version, version, version)
    end
    local all = { LUA_PATH = package.path, LUA_CPATH = package.cpath }
    for key, value in pairs(opts.environment) do all[key] = value end
    for key, value in pairs(all) do parts[#parts + 1] = quote(key .. "=" .. value) end
    return table.concat(parts, " ")
  end

  local program = opts.root .. "/bin/moonrabbit"
  local moonrabbit = exists(program) and quote(interpreter()) .. " " .. quote(program) or "moonrabbit"

  --- `moonrabbit` with these words.
  function self.moonrabbit(name, words)
    self.serial = self.serial + 1
    local parts = { environment(), moonrabbit }
    for _, word in ipairs(words) do parts[#parts + 1] = quote(word) end
    local base = opts.folder .. "/" .. name
    local child, err = spawn(name, table.concat(parts, " "), ("%s.out.%d"):format(base, self.serial), base .. ".log")
    if child then self.all[child] = true end
    return child, err
  end

  --- Any program.
  function self.program(name, words)
    local parts = {}
    for i, word in ipairs(words) do parts[i] = quote(word) end
    local base = opts.folder .. "/" .. name
    local child, err = spawn(name, table.concat(parts, " "), base .. ".out", base .. ".log")
    if child then self.all[child] = true end
    return child, err
  end

  --- Ends all that still run: SIGTERM, and SIGKILL for what is there after `seconds`.
  function self.stop_all(seconds)
    for child in pairs(self.all) do child:signal "TERM" end
    local deadline = now() + seconds
    for child in pairs(self.all) do
      while not child:ended() and now() < deadline do mr.sleep(0.02) end
      if not child:ended() then
        child:signal "KILL"
        while not child:ended() do mr.sleep(0.01) end
      end
    end
  end

  return self
end

--- The exit code; nil while it runs.
function Child:ended()
  self.code = self.code or net.wait(self.pid)
  return self.code
end

function Child:signal(name)
  if not self:ended() then net.kill(self.pid, name) end
end

--- What it has written to stdout, and to stderr.
function Child:out() return slurp(self.output) end
function Child:said() return slurp(self.log):sub(self.from) end

return children
