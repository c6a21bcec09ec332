-- Runs this checkout's programs as processes of their own, under the Lua that runs the specs.
local process = {}

local jit = rawget(_G, "jit")
process.lua = os.getenv "MOONRABBIT_SPEC_LUA" or (jit and "luajit" or "lua" .. _VERSION:match "%d%.%d")

local function quote(text) return "'" .. tostring(text):gsub("'", "'\\''") .. "'" end
process.quote = quote

local function slurp(path)
  local file = io.open(path, "rb")
  if not file then return nil end
  local text = file:read "*a"
  file:close()
  return text
end
process.slurp = slurp

function process.sleep(seconds) os.execute("sleep " .. seconds) end

--- A temporary file with these contents; the spec removes it, or the system does.
function process.file(contents)
  local path = os.tmpname()
  local file = assert(io.open(path, "wb"))
  file:write(contents)
  file:close()
  return path
end

-- The child finds the modules where this process does.
function process.setup()
  local text = ("package.path=%q package.cpath=%q"):format(package.path, package.cpath):gsub("\\\n", "\\n")
  return text
end

--- Script and arguments as one command of the shell.
function process.command(words, options)
  options = options or {}
  local parts = { "env" }
  for _, name in ipairs(options.unset or {}) do parts[#parts + 1] = "-u " .. name end
  for name, value in pairs(options.env or {}) do parts[#parts + 1] = quote(name .. "=" .. value) end
  if options.timeout ~= false then parts[#parts + 1] = "timeout -k 5 " .. (options.timeout or 60) end
  if options.raw ~= true then
    parts[#parts + 1] = process.lua .. " -e " .. quote(process.setup())
  end
  for _, word in ipairs(words) do parts[#parts + 1] = quote(word) end
  return table.concat(parts, " ")
end

--- Runs a script to its end: { code, out, err }. options: env, unset, stdin (bytes), timeout (seconds).
function process.run(words, options)
  options = options or {}
  local base = os.tmpname()
  local input = "/dev/null"
  if options.stdin then
    input = base .. ".in"
    local file = assert(io.open(input, "wb"))
    file:write(options.stdin)
    file:close()
  end
  -- By way of a file: the shell takes no command over 128 KiB.
  local script = assert(io.open(base .. ".sh", "wb"))
  script:write(process.command(words, options), "\n")
  script:close()
  os.execute(("sh %s.sh < %s > %s.out 2> %s.err; echo $? > %s.rc"):format(base, input, base, base, base))
  local result = {
    out = slurp(base .. ".out"), err = slurp(base .. ".err"), code = tonumber(slurp(base .. ".rc")),
  }
  for _, suffix in ipairs { "", ".sh", ".in", ".out", ".err", ".rc" } do os.remove(base .. suffix) end
  return result
end

local Running = {}
Running.__index = Running

--- Starts a script in the background.
function process.start(words, options)
  options = options or {}
  options.timeout = options.timeout or false
  local base = os.tmpname()
  -- "&" in a shell without job control makes a child ignore SIGINT.
  os.execute(("{ env --default-signal=INT,TERM %s < /dev/null > %s.out 2> %s.err & echo $! > %s.pid; wait $!; "
    .. "echo $? > %s.rc; } > /dev/null 2>&1 &"):format(process.command(words, options), base, base, base, base))
  local self = setmetatable({ base = base, timeout = options.timeout }, Running)
  repeat
    self.pid = tonumber(slurp(base .. ".pid") or "")
    if not self.pid then process.sleep(0.01) end
  until self.pid
  return self
end

function Running:out() return slurp(self.base .. ".out") or "" end
function Running:err() return slurp(self.base .. ".err") or "" end
function Running:code() return tonumber(slurp(self.base .. ".rc") or "") end

--- Waits until its output holds a plain text; false when it ends or the time is up before.
function Running:await(text, seconds)
  for _ = 1, (seconds or 20) * 20 do
    if self:out():find(text, 1, true) then return true end
    if self:code() then return self:out():find(text, 1, true) ~= nil end
    process.sleep(0.05)
  end
  return false
end

--- Waits for its end: the exit code, or nil when the time is up.
function Running:wait(seconds)
  for _ = 1, (seconds or 20) * 20 do
    if self:code() then return self:code() end
    process.sleep(0.05)
  end
end

function Running:signal(name) os.execute(("kill -%s %d 2> /dev/null"):format(name, self.pid)) end

--- Ends it, if it still runs, and takes its files away.
function Running:stop()
  if not self:code() then
    -- timeout(1), whose pid it is then, ends what it runs only where it is told so.
    if self.timeout then
      self:signal "TERM"
      self:wait(8)
    end
    self:signal "KILL"
    self:wait(5)
  end
  for _, suffix in ipairs { "", ".out", ".err", ".pid", ".rc" } do os.remove(self.base .. suffix) end
end

return process
