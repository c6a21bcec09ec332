-- nginx with ngx_lua for specs: in a folder and on a port of its own, ended by its pid.
local broker = require "support.broker"
local native = require "moonrabbit.runtime.native"
local ports = require "support.ports"
local ok = broker.ok

local MODULES = os.getenv "NGINX_MODULES" or "/usr/lib/nginx/modules"
-- Not NGINX: by that name nginx hands its sockets to the next one.
local PROGRAM = os.getenv "NGINX_PROGRAM" or "/usr/sbin/nginx"
-- Where its resty.core is, if not in the path of its own.
local LUALIB = os.getenv "NGINX_LUALIB"

local nginx = { modules = MODULES, program = PROGRAM }

local function readable(path)
  local file = io.open(path)
  if file then file:close() end
  return file ~= nil
end

local function slurp(path)
  local file = io.open(path, "rb")
  local text = file and file:read "*a" or ""
  if file then file:close() end
  return text
end

function nginx.shell(command)
  local pipe = io.popen(command)
  local output = pipe:read "*a"
  pipe:close()
  return (output:gsub("%s+$", ""))
end

local shell = nginx.shell

--- Why there can be no nginx; nil where there can.
function nginx.missing()
  if not readable(PROGRAM) or not readable(MODULES .. "/ngx_http_lua_module.so") then
    return "nginx with ngx_lua is not installed"
  end
end

nginx.here = shell "pwd"
local build = os.getenv "MOONRABBIT_BUILD" or "./build"
if build:sub(1, 1) ~= "/" then build = nginx.here .. "/" .. build end

nginx.free_port = ports.free

---@class support.Nginx
local Nginx = {}
Nginx.__index = Nginx

-- What every configuration here begins with.
local preamble = [[
load_module $modules/ndk_http_module.so;
load_module $modules/ngx_http_lua_module.so;
daemon on;
user $owner;
worker_processes $workers;
worker_shutdown_timeout 20s;
pid $prefix/nginx.pid;
error_log $prefix/logs/error.log info;
env AMQP_URL;
$main
events { worker_connections 1024; }
http {
  access_log off;
  lua_socket_log_errors off;
  client_body_temp_path $prefix/tmp/body;
  proxy_temp_path $prefix/tmp/proxy;
  fastcgi_temp_path $prefix/tmp/fastcgi;
  uwsgi_temp_path $prefix/tmp/uwsgi;
  scgi_temp_path $prefix/tmp/scgi;
  $paths
  $http
  server {
    listen 127.0.0.1:$port;
    $server
  }
}
]]

local paths = [[
  lua_package_path '$lualib$here/lua/?.lua;$here/lua/?/init.lua;$here/spec/resty/?.lua;$path/usr/share/lua/5.1/?.lua;;';
  lua_package_cpath '$build/5.1/?.so;;';
]]

local function fill(text, values)
  return (text:gsub("%$(%l+)%f[^%l]", function(name) return values[name] and tostring(values[name]) end))
end

local function write(self, what)
  -- Workers of a master that runs as root would be another user, who may not read the checkout.
  local values = {
    modules = MODULES, owner = shell "id -un" .. " " .. shell "id -gn", workers = what.workers or 1,
    prefix = self.prefix, here = nginx.here, build = build, port = self.port, path = what.path or "",
    lualib = LUALIB and LUALIB .. "/?.lua;" or "",
    paths = what.paths or paths, main = what.main or "", http = what.http or "", server = what.server or "",
  }
  -- Three times: what is filled in has such names itself.
  local text = fill(fill(fill(what.text or preamble, values), values), values)
  local file = assert(io.open(self.prefix .. "/nginx.conf", "w"))
  file:write(text)
  file:close()
end

local function command(self, arguments)
  return ("%s '%s' -p '%s/' -c '%s/nginx.conf' %s 2>&1"):format(self.environment, PROGRAM, self.prefix, self.prefix,
    arguments or "")
end

-- `edits` is a list of { what stands there, what shall }.
local function edited(text, edits)
  for _, edit in ipairs(edits or {}) do
    local from, to = text:find(edit[1], 1, true)
    assert(from, "not there to be edited: " .. edit[1])
    text = text:sub(1, from - 1) .. edit[2] .. text:sub(to + 1)
  end
  return text
end

local function edit_file(path, edits)
  local text = edited(slurp(path), edits)
  local file = assert(io.open(path, "w"))
  file:write(text)
  file:close()
end

-- The configuration of an example, with its port, files and modules as they are here.
local function of_example(folder, edits)
  local text = edited(slurp(folder .. "/nginx.conf"), edits)
  local search = "$lualib$here/lua/?.lua;$here/lua/?/init.lua;"
  local changes = {
    { "#load_module /usr/lib/nginx/modules", "load_module $modules" },
    { "127.0.0.1:8080", "127.0.0.1:$port" },
    { "pid nginx.pid;", "user $owner;\n  pid $prefix/nginx.pid;" },
    { "error_log stderr warn;", "error_log $prefix/logs/error.log info;" },
    { "worker_processes 2;", "worker_processes $workers;" },
    { "events { }", "$main\n  events { }" },
    { "lua_package_path '", "lua_package_cpath '$build/5.1/?.so;;';\n  lua_package_path '" .. search },
    { "access_log off;", "$http\n  access_log off;" },
    { "listen 127.0.0.1:$port;", "listen 127.0.0.1:$port;\n  $server" },
  }
  for _, change in ipairs(changes) do
    local from, to = text:find(change[1], 1, true)
    assert(from, folder .. "/nginx.conf lacks " .. change[1])
    repeat
      text = text:sub(1, from - 1) .. change[2] .. text:sub(to + 1)
      from, to = text:find(change[1], from + #change[2], true)
    until not from
  end
  return text
end

-- Starts the program; what it says when that fails. Its port may have been taken since it was free: then another one is tried.
local function launch(self, what)
  local problem
  for _ = 1, 3 do
    self.port = nginx.free_port()
    write(self, what)
    local output = shell(command(self))
    self.pid = tonumber((slurp(self.prefix .. "/nginx.pid")))
    if self.pid then return nil end
    problem = output .. "\n" .. slurp(self.prefix .. "/logs/error.log")
    if not problem:find("Address already in use", 1, true) then break end
  end
  return problem
end

--- Starts one. what: `main`, `http` and `server` (pieces of configuration), `workers`, `env` (a table), `path` (put
--- before lua_package_path, ";" at its end), `paths` (in place of lua_package_path and lua_package_cpath); or `example`, a
--- folder whose nginx.conf it is, with `edits`: { [file] = { { what stands there, what shall }, … } }. $port, $prefix,
--- $here, $build and $modules in them are filled in.
---@return support.Nginx
function nginx.start(what)
  local prefix = nginx.here .. "/build/resty-" .. shell "mktemp -u XXXXXXXX"
  os.execute("mkdir -p " .. prefix .. "/logs " .. prefix .. "/tmp")
  -- nginx is a daemon, and outlives specs that are killed: scripts/test ends it once this process is gone.
  os.execute("echo $PPID > " .. prefix .. "/owner")
  local self = setmetatable({ prefix = prefix, what = what }, Nginx)
  local environment = { "env AMQP_URL='" .. (broker.url or "") .. "'" }
  for name, value in pairs(what.env or {}) do environment[#environment + 1] = ("%s='%s'"):format(name, value) end
  self.environment = table.concat(environment, " ")
  if what.example then
    os.execute(("cp %s/* %s/"):format(what.example, prefix))
    local edits = what.edits or {}
    for name, list in pairs(edits) do edit_file(prefix .. "/" .. name, list) end
    local all = { text = of_example(what.example, edits["nginx.conf"]) }
    for key, value in pairs(what) do all[key] = value end
    what = all
    self.what = what
  end
  local problem = launch(self, what)
  if problem then
    os.execute("rm -rf '" .. prefix .. "'")
    error("nginx did not start: " .. problem, 2)
  end
  return self
end

--- An HTTP request; nothing is answered where there is no connection. opts: `method`, `body`, `headers`, `timeout`, `version`,
--- `on` (transport), called when the request is sent.
---@return string|nil body, integer? status, table? headers
function Nginx:request(path, opts)
  opts = opts or {}
  local transport, why = native.open({ host = "127.0.0.1", port = self.port }, nil, 5)
  if not transport then return nil, nil, why end
  local lines = { ("%s %s HTTP/%s"):format(opts.method or (opts.body and "POST" or "GET"), path, opts.version or "1.0"),
    "Host: localhost" }
  for name, value in pairs(opts.headers or {}) do
    for _, one in ipairs(type(value) == "table" and value or { value }) do lines[#lines + 1] = name .. ": " .. one end
  end
  if opts.body then lines[#lines + 1] = "Content-Length: " .. #opts.body end
  transport:write(table.concat(lines, "\r\n") .. "\r\n\r\n" .. (opts.body or ""))
  if opts.on then opts.on(transport) end
  local parts = {}
  while true do
    local bytes = transport:read(65536, opts.timeout or 30)
    if not bytes then break end
    parts[#parts + 1] = bytes
  end
  transport:close()
  local response = table.concat(parts)
  local head, body = response:match "^(.-)\r\n\r\n(.*)$"
  if not head then return nil end
  local headers = {}
  for name, value in head:gmatch "\r\n([^:]+):%s*([^\r]*)" do headers[name:lower()] = value end
  return body, tonumber(head:match "^HTTP/%S+ (%d+)"), headers
end

--- Waits until it answers.
function Nginx:ready(path)
  broker.eventually(function() return select(2, self:request(path)) == 200 end, 10, "nginx answers")
  return self
end

--- The text of its error log.
function Nginx:log() return slurp(self.prefix .. "/logs/error.log") end

--- Waits for a line in the log.
function Nginx:logged(pattern, seconds)
  return ok(broker.eventually(function() return self:log():match(pattern) end, seconds or 10, "logged: " .. pattern))
end

--- The pids of its workers; those that are shutting down too.
function Nginx:workers()
  local list = {}
  for pid in shell("ps -o pid= --ppid " .. self.pid):gmatch "%d+" do list[#list + 1] = tonumber(pid) end
  table.sort(list)
  return list
end

function nginx.alive(pid)
  local state = slurp("/proc/" .. pid .. "/stat"):match "%) (%a)"
  return state ~= nil and state ~= "Z"
end

--- Sends a signal to the master: HUP, QUIT, TERM.
function Nginx:signal(name) os.execute(("kill -%s %d"):format(name, self.pid)) end

--- Reloads, and waits until the new workers are there; returns the pids of the old ones.
function Nginx:reload(what)
  if what then write(self, what) end
  local old = self:workers()
  local is_old = {}
  for _, pid in ipairs(old) do is_old[pid] = true end
  self:signal "HUP"
  broker.eventually(function()
    for _, pid in ipairs(self:workers()) do
      if not is_old[pid] then return true end
    end
  end, 10, "new workers")
  return old
end

--- Waits until every one of these processes is gone.
function nginx.gone(pids, seconds)
  broker.eventually(function()
    for _, pid in ipairs(pids) do
      if nginx.alive(pid) then return false end
    end
    return true
  end, seconds or 20, "processes gone")
end

-- What no nginx of ours may log, whatever a spec does to it. Specs kill workers with signal 9.
local function shame(text)
  for line in text:gmatch "[^\n]+" do
    if line:find("error in a task", 1, true) or line:find("left in connection", 1, true)
      or line:match "exited on signal (%d+)" and not line:find "exited on signal 9" then return line end
  end
end

--- Ends it, and removes its folder unless KEEP is set. Throws when a worker stays behind, or something went wrong unseen.
function Nginx:stop()
  local pids = self:workers()
  pids[#pids + 1] = self.pid
  if nginx.alive(self.pid) then self:signal "QUIT" end
  local gone = pcall(nginx.gone, pids, 15)
  if not gone then
    for _, pid in ipairs(pids) do
      if nginx.alive(pid) then os.execute("kill -KILL " .. pid) end
    end
  end
  local line = shame(self:log())
  if not os.getenv "KEEP" then os.execute("rm -rf '" .. self.prefix .. "'") end
  if not gone then error("a worker of nginx stayed behind", 2) end
  if line then error("nginx logged: " .. line, 2) end
end

return nginx
