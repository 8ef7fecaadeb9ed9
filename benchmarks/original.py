"""What it costs to lay a map on a large photo: memory above what was there before, as the kernel counts it, and seconds.

python benchmarks/original.py [megapixels] [threads] # 24 and 2; each line is from a process of its own
"""
import shutil, subprocess, sys, tempfile, time
from pathlib import Path


def make_photo(path, megapixels):
    "Write a JPEG of 3:2, of structures from coarse to fine and some noise"
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    h = int((megapixels*1e6/1.5)**.5)
    im = Image.new('RGB', (h*3//2, h), 'grey')
    for cell,weight in ((h//4, .5), (h//40, .3), (h//160, .2), (2, .1)):
        part = Image.fromarray(rng.integers(0, 255, (h//cell+1, im.width//cell+1, 3), dtype=np.uint8))
        im = Image.blend(im, part.resize(im.size, Image.BICUBIC), weight)
    im.save(path, quality=92)
    return im.size


def memory(what):
    "Read the memory of this process in MB: 'VmRSS' now, 'VmHWM' at most so far"
    line, = [o for o in open('/proc/self/status') if o.startswith(what)]
    return int(line.split()[1])/1000


def do(job, photo, folder, threads):
    "Lay a small map on `photo`; print the MB that this took at most, and the seconds by the clock and of the processor"
    from fastai.vision.all import ImageDataLoaders, Image, Resize, resnet18, torch, vision_learner
    from fastai_heatmaps.data.images import to_images
    import fastai_heatmaps.all
    torch.set_num_threads(threads)
    small = folder/'small.png'
    Image.new('RGB', (64,48), 'red').save(small)
    dls = ImageDataLoaders.from_lists(folder, [small]*4, ['a','b']*2, valid_pct=.5, item_tfms=Resize(224), bs=1, num_workers=0, device='cpu')
    hm = vision_learner(dls, resnet18, pretrained=False, normalize=False).get_heatmaps([small])
    def run(hm, out):
        if job=='show': hm.show(on='original').figure.canvas.draw()
        elif job=='find': hm.images.photo(0)
        else: hm.save(folder/out, job, on='original')
    run(hm, 'first') # loads what is loaded once
    hm = hm.replace(images=to_images(dls, [photo])) # which has not been opened yet
    Path('/proc/self/clear_refs').write_text('5') # sets the peak to what is used now
    before,wall,cpu = memory('VmRSS'),time.perf_counter(),time.process_time()
    run(hm, 'pictures')
    print(memory('VmHWM')-before, time.perf_counter()-wall, time.process_time()-cpu)


def main(megapixels=24, threads=2):
    "Run each job in a process of its own, and print a table"
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder)/'photo.jpg'
        w,h = make_photo(photo, megapixels)
        own = w*h*3/1e6
        print(f"A photo of {w}×{h}, {own:.0f} MB as pixels; 'find' opens it and finds where the transforms took its points")
        for job in ('png', 'jpg', 'webp', 'show', 'find'):
            done = subprocess.run([sys.executable, '-W', 'ignore', __file__, job, photo, folder, str(threads)], capture_output=True, text=True, check=True)
            mb,wall,cpu = map(float, done.stdout.split()[-3:])
            files = sum(o.stat().st_size for o in Path(folder).glob('pictures/*'))/1e6
            print(f'{job:5} {mb:6.0f} MB, {mb/own:5.2f} × its pixels {wall:6.1f} s, {cpu:5.1f} s of the processor' + (f', files of {files:.0f} MB' if files else ''))
            shutil.rmtree(Path(folder)/'pictures', ignore_errors=True)
            shutil.rmtree(Path(folder)/'first', ignore_errors=True)


if __name__=='__main__':
    if sys.argv[1:2] and sys.argv[1].isalpha(): do(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else: main(*map(int, sys.argv[1:]))
